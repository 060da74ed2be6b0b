#!/usr/bin/env bash
# Runs every fuzz test of the module for the time given (default 1m) each.
set -euo pipefail
cd "$(dirname "$0")/.."
for dir in $(git grep -l '^func Fuzz' -- '*_test.go' | xargs -n1 dirname | sort -u); do
  for name in $(grep -ho '^func Fuzz[A-Za-z0-9_]*' "$dir"/*_test.go | cut -d' ' -f2); do
    echo "== $dir $name"
    go test -tags nomsgpack -run '^$' -fuzz "^$name\$" -fuzztime "${1:-1m}" "./$dir"
  done
done
