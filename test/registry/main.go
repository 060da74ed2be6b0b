// Command registry serves docker/distribution as a library, for machines
// without Debian's docker-registry: registry serve CONFIG. Its log is the same.
package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"time"

	"github.com/docker/distribution/configuration"
	"github.com/docker/distribution/registry/handlers"
	_ "github.com/docker/distribution/registry/storage/driver/filesystem" // the storage that the tests configure
	gorilla "github.com/gorilla/handlers"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "registry:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) != 2 || args[0] != "serve" {
		return errors.New("use: registry serve CONFIG")
	}
	file, err := os.Open(args[1])
	if err != nil {
		return err
	}
	defer file.Close()
	config, err := configuration.Parse(file)
	if err != nil {
		return fmt.Errorf("read the configuration: %w", err)
	}
	app := handlers.NewApp(context.Background(), config)
	server := &http.Server{
		Addr:              config.HTTP.Addr,
		Handler:           gorilla.CombinedLoggingHandler(os.Stdout, app),
		ReadHeaderTimeout: 10 * time.Second,
	}
	return server.ListenAndServe()
}
