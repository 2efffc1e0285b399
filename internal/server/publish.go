package server

import (
	"context"
	"fmt"
	"time"

	bundlepublisherv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/server/bundlepublisher/v1"
	notifierv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/server/notifier/v1"
	plugintypes "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/types"
	"google.golang.org/protobuf/proto"

	"github.com/rootlink/rootlink/internal/catalog"
)

const (
	bundlePublisherType = "BundlePublisher"
	notifierType        = "Notifier"

	// publishEvery is how often the bundle is looked at, and tried again with a
	// publisher that failed. An authority is published long before it is used.
	publishEvery         = 5 * time.Second
	pluginPublishTimeout = time.Minute
)

// publisher is a plugin that is told of the bundle: a BundlePublisher or a
// Notifier.
type publisher struct {
	plugin *catalog.Plugin
	send   func(context.Context, *plugintypes.Bundle) error
	// advise, of a notifier, tells it of the first bundle, and may object.
	advise func(context.Context, *plugintypes.Bundle) error
	last   *plugintypes.Bundle // that it took; before Run New's, then publish's
}

func (s *Server) addPublisher(p *catalog.Plugin) error {
	client := new(bundlepublisherv1.BundlePublisherPluginClient)
	if err := p.Bind(client); err != nil {
		return err
	}
	s.publishers = append(s.publishers, &publisher{plugin: p, send: func(ctx context.Context, b *plugintypes.Bundle) error {
		_, err := client.PublishBundle(ctx, &bundlepublisherv1.PublishBundleRequest{Bundle: b})
		return err
	}})
	return nil
}

func (s *Server) addNotifier(p *catalog.Plugin) error {
	client := new(notifierv1.NotifierPluginClient)
	if err := p.Bind(client); err != nil {
		return err
	}
	s.publishers = append(s.publishers, &publisher{
		plugin: p,
		send: func(ctx context.Context, b *plugintypes.Bundle) error {
			_, err := client.Notify(ctx, &notifierv1.NotifyRequest{
				Event: &notifierv1.NotifyRequest_BundleUpdated{BundleUpdated: &notifierv1.BundleUpdated{Bundle: b}},
			})
			return err
		},
		advise: func(ctx context.Context, b *plugintypes.Bundle) error {
			_, err := client.NotifyAndAdvise(ctx, &notifierv1.NotifyAndAdviseRequest{
				Event: &notifierv1.NotifyAndAdviseRequest_BundleLoaded{BundleLoaded: &notifierv1.BundleLoaded{Bundle: b}},
			})
			return err
		},
	})
	return nil
}

// advised tells each notifier of the bundle that is about to be served. One that
// objects, or does not answer, keeps the server from starting: whoever waits for
// what it does would wait for ever.
func (s *Server) advised(ctx context.Context) error {
	for _, p := range s.publishers {
		if p.advise == nil {
			continue
		}
		b, err := s.pluginBundle()
		if err != nil {
			return err
		}
		call, cancel := context.WithTimeout(ctx, pluginPublishTimeout)
		err = p.advise(call, b)
		cancel()
		if err != nil {
			return fmt.Errorf("notifier %q, told of the bundle: %w", p.plugin.Name(), err)
		}
		p.last = b
	}
	return nil
}

// publish gives p the bundle now and whenever it has changed, until ctx ends.
func (s *Server) publish(ctx context.Context, p *publisher) {
	t := time.NewTicker(publishEvery)
	defer t.Stop()
	restarts, failing := 0, false
	for {
		b, err := s.pluginBundle()
		// A plugin that was started again may have forgotten what it had.
		if n := p.plugin.Restarts(); n != restarts {
			restarts, p.last = n, nil
		}
		if err == nil && !proto.Equal(b, p.last) {
			call, cancel := context.WithTimeout(ctx, pluginPublishTimeout)
			err = p.send(call, b)
			cancel()
			if err == nil {
				p.last = b
				s.cfg.Log.Info("bundle published", "plugin", p.plugin.Name(), "authorities", len(b.X509Authorities))
			}
		}
		if err != nil && ctx.Err() == nil && !failing {
			s.cfg.Log.Error("bundle not published, tried again until it is", "plugin", p.plugin.Name(), "error", err)
		}
		failing = err != nil
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
	}
}

// pluginBundle is the bundle as plugins are shown it.
func (s *Server) pluginBundle() (*plugintypes.Bundle, error) {
	sequence, err := s.store.BundleSequence()
	if err != nil {
		return nil, err
	}
	b := &plugintypes.Bundle{TrustDomain: s.cfg.TrustDomain, RefreshHint: bundleRefresh, SequenceNumber: sequence}
	now := s.cfg.Now()
	for _, c := range s.authorities.set.Load().valid(now) {
		b.X509Authorities = append(b.X509Authorities, &plugintypes.X509Certificate{Asn1: c.Raw})
	}
	for _, k := range s.jwt.set.Load().keys(now) {
		b.JwtAuthorities = append(b.JwtAuthorities, &plugintypes.JWTKey{KeyId: k.KeyId, PublicKey: k.PublicKey, ExpiresAt: k.ExpiresAt})
	}
	return b, nil
}
