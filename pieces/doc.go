// Package pieces is what a blob is made of: its layout in pieces, sets of
// pieces, their digests, and the store that keeps them on disk.
//
// A piece in the store, as a task's have, good and digests tell it:
//
//	unknown ──SetDigests──▶ known ──Receive──▶ good ◀──verify──┐
//	   └───────────────Make───────────────────▶ good           │
//	                                             │ unclean end │
//	                                             ├──▶ in doubt ┴──verify──▶ known
//	                                             └──verify, or dropped from a window──▶ known
//
// Only good pieces are given to anyone: Has, CopyRange, Wait and Reader verify
// what is in doubt before they say that it is there. CopyRange and Reader verify
// once more what is good but not fresh: see verify.go.
//
// Locks are taken in the order task.disk, Store.mu, task.mu; Content.files is
// taken before the latter two and after the first.
package pieces
