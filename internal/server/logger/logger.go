// Package logger answers SPIRE's logger service: the level of the log, changed
// while the server runs.
package logger

import (
	"context"
	"log/slog"

	loggerv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/logger/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// levels are SPIRE's in ours. Nothing is logged at those above error, so with
// them the log falls silent, alarms too: that is what somebody asked for.
var levels = map[types.LogLevel]slog.Level{
	types.LogLevel_PANIC: slog.LevelError + 8,
	types.LogLevel_FATAL: slog.LevelError + 4,
	types.LogLevel_ERROR: slog.LevelError,
	types.LogLevel_WARN:  slog.LevelWarn,
	types.LogLevel_INFO:  slog.LevelInfo,
	types.LogLevel_DEBUG: slog.LevelDebug,
	types.LogLevel_TRACE: slog.LevelDebug - 4,
}

// Service changes one level.
type Service struct {
	loggerv1.UnimplementedLoggerServer
	level  *slog.LevelVar
	launch slog.Level
	log    *slog.Logger
}

// New returns the service of level, which is at its launch value; nil makes
// every call fail.
func New(level *slog.LevelVar, log *slog.Logger) *Service {
	s := &Service{level: level, log: log}
	if level != nil {
		s.launch = level.Level()
	}
	return s
}

func (s *Service) state() (*types.Logger, error) {
	if s.level == nil {
		return nil, status.Error(codes.FailedPrecondition, "the log's level is fixed in this process")
	}
	return &types.Logger{CurrentLevel: name(s.level.Level()), LaunchLevel: name(s.launch)}, nil
}

// name is SPIRE's name of the least level that is logged at l.
func name(l slog.Level) types.LogLevel {
	best := types.LogLevel_PANIC
	for n, v := range levels {
		if v >= l && v < levels[best] {
			best = n
		}
	}
	return best
}

// GetLogger tells the level now and that at the start.
func (s *Service) GetLogger(context.Context, *loggerv1.GetLoggerRequest) (*types.Logger, error) {
	return s.state()
}

// SetLogLevel changes the level until the next change or start.
func (s *Service) SetLogLevel(_ context.Context, req *loggerv1.SetLogLevelRequest) (*types.Logger, error) {
	if req.NewLevel == types.LogLevel_UNSPECIFIED {
		return nil, status.Error(codes.InvalidArgument, "newLevel value cannot be LogLevel_UNSPECIFIED")
	}
	l, ok := levels[req.NewLevel]
	if !ok {
		return nil, status.Error(codes.InvalidArgument, "unsupported log level")
	}
	return s.set(l)
}

// ResetLogLevel brings the level of the start back.
func (s *Service) ResetLogLevel(context.Context, *loggerv1.ResetLogLevelRequest) (*types.Logger, error) {
	return s.set(s.launch)
}

// set logs the change at a level that is on before or after it: who silences
// the log leaves that as its last line.
func (s *Service) set(l slog.Level) (*types.Logger, error) {
	if s.level == nil {
		return s.state()
	}
	s.log.Log(context.Background(), max(s.level.Level(), slog.LevelInfo), "log level changed", "from", s.level.Level(), "to", l)
	s.level.Set(l)
	return s.state()
}
