package dfget

import (
	"errors"
	"io"

	"go.uber.org/zap"
)

// maxAgain bounds the bytes given that are read again to go on with the digest of
// the whole.
const maxAgain = 256 << 20

// errDropped ends a stream of which bytes have been given that may be wrong, or of
// another version than the origin's now.
var errDropped = errors.New("the content was dropped while it was read: ask again")

// errWrongOrigin ends a stream of the origin's bytes before the last of them.
var errWrongOrigin = errors.New("the origin's bytes do not have the content's digest")

// fallBack makes the stream one of the origin from s.off on.
func (s *Stream) fallBack(cause string) error {
	if cause == causeStore && s.given && s.id.Content() == "" || s.given && s.isWrong() {
		return errDropped // nobody could tell the mixture of two versions
	}
	s.mixed = s.given
	s.verify()
	s.p.metrics.fallbacks.WithLabelValues(cause).Inc()
	if c := s.p.log.Check(zap.WarnLevel, "asking the origin"); c != nil && cause != causeNoSession && cause != causeClear {
		c.Write(zap.String("task", string(s.id)), zap.String("cause", cause), zap.Int64("offset", s.off), zap.Error(s.refused))
	}
	s.leave()
	return nil
}

// verify has what the origin gives compared with the content's digest, together
// with what the region has given, where the stream is of the whole.
func (s *Stream) verify() {
	if s.id.Content() == "" || s.given && (s.length != s.size || s.off > maxAgain) {
		return
	}
	s.sum = s.id.Content().Verifier()
	if !s.given {
		return
	}
	if _, err := s.content.CopyRange(s.sum, 0, s.off); err != nil {
		s.sum = nil
	}
}

// isWrong tells whether the region has taken back what it gave.
func (s *Stream) isWrong() bool { return s.task != nil && s.task.wrong.Load() }

// compare takes in what the origin gives, of which the last bytes are held back where
// the whole turns out wrong.
func (s *Stream) compare(b []byte, err error) (int, error) {
	if s.sum == nil {
		return len(b), err
	}
	_, _ = s.sum.Write(b) // a hash takes all
	whole := s.off+int64(len(b)) == s.size || s.size < 0 && errors.Is(err, io.EOF)
	if whole && !s.sum.Verified() {
		s.p.metrics.verifyFailures.Inc()
		return 0, errWrongOrigin
	}
	return len(b), err
}
