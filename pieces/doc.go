// Package pieces is what a blob is made of: its layout in pieces, sets of
// pieces, their digests, and the store that keeps them on disk.
package pieces
