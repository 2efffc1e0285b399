package catalog

import (
	"context"
	"strings"

	"github.com/spiffe/spire-plugin-sdk/pluginsdk"
	metricsv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/hostservice/common/metrics/v1"
	"google.golang.org/protobuf/types/known/emptypb"
)

// maxMetricKey is the longest key of a metric that is passed on, in bytes.
const maxMetricKey = 128

// Metrics is the host service that plugins count with. What happened once more
// goes to count, under the key's parts with dots between; nil takes it and keeps
// nothing. Values and labels are not kept, nor are keys of odd characters:
// labels can hold what a caller sent.
func Metrics(count func(key string)) pluginsdk.ServiceServer {
	return metricsv1.MetricsServiceServer(&metricsService{count: count})
}

type metricsService struct {
	metricsv1.UnimplementedMetricsServer
	count func(string)
}

func (m *metricsService) add(key []string) (*emptypb.Empty, error) {
	name := strings.Join(key, ".")
	plain := func(r rune) bool {
		return r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("._-", r)
	}
	if m.count != nil && name != "" && len(name) <= maxMetricKey && !strings.ContainsFunc(name, func(r rune) bool { return !plain(r) }) {
		m.count(name)
	}
	return &emptypb.Empty{}, nil
}

func (m *metricsService) IncrCounter(_ context.Context, r *metricsv1.IncrCounterRequest) (*emptypb.Empty, error) {
	return m.add(r.GetKey())
}

func (m *metricsService) EmitKey(_ context.Context, r *metricsv1.EmitKeyRequest) (*emptypb.Empty, error) {
	return m.add(r.GetKey())
}

func (m *metricsService) SetGauge(context.Context, *metricsv1.SetGaugeRequest) (*emptypb.Empty, error) {
	return &emptypb.Empty{}, nil
}

func (m *metricsService) AddSample(_ context.Context, r *metricsv1.AddSampleRequest) (*emptypb.Empty, error) {
	return m.add(r.GetKey())
}

func (m *metricsService) MeasureSince(_ context.Context, r *metricsv1.MeasureSinceRequest) (*emptypb.Empty, error) {
	return m.add(r.GetKey())
}
