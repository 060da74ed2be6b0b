package dfget

import (
	"bytes"
	"io"
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestReceiverIsWokenForMuchAtATime(t *testing.T) {
	body := bytes.Repeat([]byte("damselfly"), 200_000)
	s := httptest.NewServer(trickle(body, 9000, 0))
	defer s.Close()
	client := &http.Client{Transport: newTransport(1)}
	fewest := len(body)
	for try := 0; try < 20 && fewest > len(body)/maxWait*3/2+8; try++ { // a busy machine may wake it more often
		resp := bodyOf(t, client, s.URL)
		reads := &counted{Reader: resp}
		got := make([]byte, len(body))
		_, err := io.ReadFull(reads, got)
		require.NoError(t, err)
		require.Equal(t, body, got)
		fewest = min(fewest, reads.n)
		require.NoError(t, resp.Close())
	}
	require.LessOrEqual(t, fewest, len(body)/maxWait*3/2+8, "reads of a body that came in %d packets", len(body)/9000)
}
