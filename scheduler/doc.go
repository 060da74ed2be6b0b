// Package scheduler decides who sends which piece to whom.
package scheduler
