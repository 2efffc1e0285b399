package catalog

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"time"

	goplugin "github.com/hashicorp/go-plugin"
	"github.com/hashicorp/go-plugin/runner"

	"github.com/hashicorp/go-hclog"
	"github.com/spiffe/spire-plugin-sdk/pluginsdk"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
)

const (
	hostServicesID  = 1 // with go-plugin's broker, as the SDK has it
	protocolVersion = 1
	initMethod      = "/spire.service.private.init.v1.Init/Init"
	deinitMethod    = "/spire.service.private.init.v1.Init/Deinit"

	maxServices    = 64  // that one plugin may offer
	maxServiceName = 256 // bytes

	deinitTimeout = 5 * time.Second
	quitTimeout   = 3 * time.Second // for a plugin that was asked to end
)

// process is an external plugin that runs, as one process.
type process struct {
	prog   *program
	client *goplugin.Client
	conn   *grpc.ClientConn
	host   *grpc.Server // its end of the host services
	names  []string     // of the services it offers
}

// startProcess runs the program and shakes hands. ctx bounds all of it.
func startProcess(ctx context.Context, c Config, prog *program, o Options, out *output) (_ *process, err error) {
	p := &process{prog: prog}
	h := &handshake{p: p, services: o.HostServices, out: out}
	p.client = goplugin.NewClient(&goplugin.ClientConfig{
		HandshakeConfig: goplugin.HandshakeConfig{
			ProtocolVersion: protocolVersion, MagicCookieKey: c.Type, MagicCookieValue: c.Type,
		},
		Plugins:          map[string]goplugin.Plugin{c.Type: h},
		AllowedProtocols: []goplugin.Protocol{goplugin.ProtocolGRPC},
		StartTimeout:     o.startTimeout(),
		Logger:           out.hclog(),
		SyncStdout:       out.lines(), SyncStderr: out.lines(),
		GRPCDialOptions: []grpc.DialOption{grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(MaxMessage))},
		RunnerFunc: func(_ hclog.Logger, spec *exec.Cmd, _ string) (runner.Runner, error) {
			prog.env = append(spec.Env, c.Env...)
			return prog, nil
		},
	})
	// go-plugin takes no context; without its process it gives up by itself.
	stop := context.AfterFunc(ctx, prog.kill)
	defer stop()
	defer func() {
		if err != nil {
			prog.kill()
			p.release()
			prog.file.Close() // when it was never started
			if ctx.Err() != nil {
				err = fmt.Errorf("%w: %w", context.Cause(ctx), err)
			}
		}
	}()
	client, err := p.client.Client()
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", prog.path, err)
	}
	if _, err := client.Dispense(c.Type); err != nil {
		return nil, fmt.Errorf("start %s: %w", prog.path, err)
	}
	return p, p.init(ctx, names(o.HostServices))
}

// handshake is what go-plugin calls when the connection stands.
type handshake struct {
	goplugin.NetRPCUnsupportedPlugin
	p        *process
	services []pluginsdk.ServiceServer
	out      *output
}

func (h *handshake) GRPCServer(*goplugin.GRPCBroker, *grpc.Server) error {
	return errors.New("this is the host")
}

func (h *handshake) GRPCClient(_ context.Context, broker *goplugin.GRPCBroker, conn *grpc.ClientConn) (any, error) {
	l, err := broker.Accept(hostServicesID)
	if err != nil {
		return nil, err
	}
	h.p.conn, h.p.host = conn, newServer(h.out.log)
	for _, s := range h.services {
		s.RegisterServer(h.p.host)
	}
	go func() { _ = h.p.host.Serve(l) }() // ends with an error only when it was stopped
	return h.p, nil
}

// init tells the plugin which services the host has, and learns its own. The
// SDK keeps this service's Go code to itself.
func (p *process) init(ctx context.Context, host []string) error {
	var req []byte
	for _, name := range host {
		req = protowire.AppendString(protowire.AppendTag(req, 1, protowire.BytesType), name)
	}
	var resp []byte
	if err := p.conn.Invoke(ctx, initMethod, &req, &resp, grpc.ForceCodec(rawCodec{})); err != nil {
		return fmt.Errorf("initialise: %s", message(err))
	}
	for len(resp) > 0 {
		num, typ, n := protowire.ConsumeTag(resp)
		if n < 0 {
			return fmt.Errorf("initialise: malformed answer: %w", protowire.ParseError(n))
		}
		resp = resp[n:]
		if num != 1 || typ != protowire.BytesType {
			if n = protowire.ConsumeFieldValue(num, typ, resp); n < 0 {
				return fmt.Errorf("initialise: malformed answer: %w", protowire.ParseError(n))
			}
			resp = resp[n:]
			continue
		}
		name, n := protowire.ConsumeString(resp)
		switch {
		case n < 0:
			return fmt.Errorf("initialise: malformed answer: %w", protowire.ParseError(n))
		case len(name) > maxServiceName || len(p.names) == maxServices:
			return errors.New("initialise: the plugin offers too many services")
		}
		p.names, resp = append(p.names, name), resp[n:]
	}
	return nil
}

// alive says whether the plugin answers at all; what it answers is its own.
func (p *process) alive(ctx context.Context) error {
	_, err := grpc_health_v1.NewHealthClient(p.conn).Check(ctx, &grpc_health_v1.HealthCheckRequest{Service: goplugin.GRPCServiceName})
	switch status.Code(err) {
	case codes.DeadlineExceeded, codes.Unavailable, codes.Canceled:
		return err
	}
	return nil
}

// quit asks the plugin to end, and ends it when it does not.
func (p *process) quit() {
	ctx, cancel := context.WithTimeout(context.Background(), deinitTimeout)
	defer cancel()
	var req, resp []byte
	_ = p.conn.Invoke(ctx, deinitMethod, &req, &resp, grpc.ForceCodec(rawCodec{})) // Unimplemented is fine, and it ends either way
	p.release()
}

// release frees what go-plugin and we hold for the process, ending it if it
// still runs.
func (p *process) release() {
	t := time.AfterFunc(quitTimeout, p.prog.kill)
	defer t.Stop()
	p.client.Kill()
	if p.host != nil {
		p.host.Stop()
	}
}

// rawCodec passes messages through as the bytes they are.
type rawCodec struct{}

func (rawCodec) Marshal(v any) ([]byte, error) { return *v.(*[]byte), nil }

func (rawCodec) Unmarshal(b []byte, v any) error {
	*v.(*[]byte) = append([]byte(nil), b...)
	return nil
}

func (rawCodec) Name() string { return "proto" }
