package suite

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	reflection "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/known/emptypb"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

const service = "SpiffeWorkloadAPI"

func endpointClauses() []Clause {
	return []Clause{
		{"workload-endpoint/3/served-over-grpc", Must, "the endpoint speaks gRPC", checkGRPC},
		{"workload-endpoint/3/unix-domain-socket", Should, "a Unix domain socket is preferred to TCP", func(_ context.Context, r *run) error {
			if !strings.HasPrefix(r.Socket, "unix:") {
				return fmt.Errorf("%s is TCP", r.Socket)
			}
			return nil
		}},
		{"workload-endpoint/3/missing-header-rejected", Must, "a request without the header workload.spiffe.io is rejected", rejected()},
		{"workload-endpoint/3/wrong-header-rejected", Must, "a request whose header is not the value true is rejected", rejected("false", "", "1")},
		{"workload-endpoint/3/header-is-case-sensitive", Must, "true in other letters is not the header's value", rejected("True", "TRUE")},
		{"workload-endpoint/3.1/tls-not-required", Must, "a client without TLS is served", checkNoTLS},
		{"workload-endpoint/5/no-client-authentication", Must, "a client is asked for no credentials of its own", checkNoCredentials},
		{"workload-endpoint/6/missing-header-is-invalid-argument", Must, "without the header the code is InvalidArgument", checkMissingHeaderCode},
		{"workload-endpoint/6/wrong-header-is-invalid-argument", Should, "with a wrong header the code is InvalidArgument, too", checkWrongHeaderCode},
		{"workload-endpoint/7/workload-api-exposed", Must, "the Workload API is there", checkExposed},
		{"workload-endpoint/7/services-not-extended", Must, "the Workload API's service has no methods of the implementation's own", checkNotExtended},
		{"workload-endpoint/7/reflection", Should, "gRPC server reflection tells what else is served", func(ctx context.Context, r *run) error {
			_, err := r.reflect(ctx)
			return err
		}},
		{"workload-endpoint/A/unknown-is-unimplemented", Should, "an RPC that is not there is Unimplemented", func(ctx context.Context, r *run) error {
			if err := r.invoke(ctx, "/"+service+"/NoSuchMethod"); status.Code(err) != codes.Unimplemented {
				return fmt.Errorf("NoSuchMethod: %s", short(err))
			}
			return nil
		}},
	}
}

func checkGRPC(ctx context.Context, r *run) error {
	if r.dead != nil {
		return errors.New(short(r.dead))
	}
	return nil
}

func checkNoTLS(ctx context.Context, r *run) error {
	if r.dead == nil {
		return nil // this connection has none
	}
	if r.speaksTLS(ctx) {
		return errors.New("it answers with TLS, and without it not")
	}
	return notRun("see workload-endpoint/3/served-over-grpc")
}

func checkNoCredentials(ctx context.Context, r *run) error {
	var bad problems
	ctx, cancel := call(ctx)
	defer cancel()
	err := r.eachRPC(ctx, func(name string, err error) {
		if status.Code(err) == codes.Unauthenticated {
			bad.add("%s: %s", name, short(err))
		}
	})
	if err != nil {
		return err
	}
	return bad.err()
}

// rejected calls every method with each value of the header; none: without it.
func rejected(values ...string) func(context.Context, *run) error {
	return func(ctx context.Context, r *run) error {
		if r.dead != nil {
			return notRun("see workload-endpoint/3/served-over-grpc")
		}
		return r.headers(ctx, values, func(err error) bool {
			switch status.Code(err) {
			case codes.OK, codes.DeadlineExceeded, codes.Unavailable:
				return false
			}
			return true
		})
	}
}

func checkMissingHeaderCode(ctx context.Context, r *run) error {
	return r.headers(ctx, nil, isInvalidArgument)
}

func checkWrongHeaderCode(ctx context.Context, r *run) error {
	return r.headers(ctx, []string{"false", "TRUE"}, isInvalidArgument)
}

func isInvalidArgument(err error) bool { return status.Code(err) == codes.InvalidArgument }

func (r *run) headers(ctx context.Context, values []string, good func(error) bool) error {
	var bad problems
	contexts := map[string]context.Context{}
	for _, v := range values {
		contexts[fmt.Sprintf("%q", v)] = withHeader(ctx, v)
	}
	if len(values) == 0 {
		contexts["no header"] = ctx
	}
	for what, ctx := range contexts {
		err := r.eachRPC(ctx, func(name string, err error) {
			if !good(err) {
				bad.add("%s with %s: %s", name, what, short(err))
			}
		})
		if err != nil {
			return err
		}
	}
	slices.Sort(bad)
	return bad.err()
}

func (r *run) invoke(ctx context.Context, method string) error {
	ctx, cancel := call(ctx)
	defer cancel()
	return r.conn.Invoke(ctx, method, &emptypb.Empty{}, &emptypb.Empty{})
}

func checkExposed(ctx context.Context, r *run) error {
	there := false
	ctx, cancel := call(ctx)
	defer cancel()
	var last error
	err := r.eachRPC(ctx, func(_ string, err error) {
		last = err
		there = there || status.Code(err) != codes.Unimplemented
	})
	if err == nil && !there {
		err = fmt.Errorf("no method of it is implemented: %s", short(last))
	}
	return err
}

// The WIT-SVID profile's methods are of the newer, experimental document.
var specified = []string{"FetchX509SVID", "FetchX509Bundles", "FetchJWTSVID", "FetchJWTBundles", "ValidateJWTSVID", "FetchWITSVID", "FetchWITBundles"}

// checkNotExtended asks reflection where there is one. Where there is none only
// this can be seen: a method that no document has is not answered.
func checkNotExtended(ctx context.Context, r *run) error {
	var bad problems
	if methods, err := r.reflect(ctx); err == nil {
		for _, m := range methods {
			if !slices.Contains(specified, m) {
				bad.add("reflection lists %s", m)
			}
		}
	}
	if err := r.invoke(ctx, "/"+service+"/NoSuchMethod"); err == nil {
		bad.add("NoSuchMethod is answered")
	}
	return bad.err()
}

// reflect lists the methods of the Workload API's service.
func (r *run) reflect(ctx context.Context) ([]string, error) {
	ctx, cancel := call(ctx)
	defer cancel()
	s, err := reflection.NewServerReflectionClient(r.conn).ServerReflectionInfo(ctx)
	if err != nil {
		return nil, err
	}
	ask := &reflection.ServerReflectionRequest{MessageRequest: &reflection.ServerReflectionRequest_FileContainingSymbol{FileContainingSymbol: service}}
	if err := s.Send(ask); err != nil {
		return nil, err
	}
	answer, err := s.Recv()
	if err != nil {
		return nil, fmt.Errorf("no reflection: %s", short(err))
	}
	var methods []string
	for _, raw := range answer.GetFileDescriptorResponse().GetFileDescriptorProto() {
		file := &descriptorpb.FileDescriptorProto{}
		if err := proto.Unmarshal(raw, file); err != nil {
			return nil, err
		}
		for _, svc := range file.GetService() {
			for _, m := range svc.GetMethod() {
				if svc.GetName() == service {
					methods = append(methods, m.GetName())
				}
			}
		}
	}
	if len(methods) == 0 {
		return nil, fmt.Errorf("reflection does not know %s", service)
	}
	return methods, nil
}
