package server

import (
	"context"
	"time"

	bundlepublisherv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/server/bundlepublisher/v1"
	plugintypes "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/types"
	"google.golang.org/protobuf/proto"

	"github.com/rootlink/rootlink/internal/catalog"
)

const (
	bundlePublisherType = "BundlePublisher"

	// publishEvery is how often the bundle is looked at, and tried again with a
	// publisher that failed. An authority is published long before it is used.
	publishEvery         = 5 * time.Second
	pluginPublishTimeout = time.Minute
)

// publisher is a BundlePublisher.
type publisher struct {
	plugin *catalog.Plugin
	client *bundlepublisherv1.BundlePublisherPluginClient
	data   string // as it was given last; only ReloadPlugins uses it
}

// publish gives p the bundle now and whenever it has changed, until ctx ends.
func (s *Server) publish(ctx context.Context, p *publisher) {
	t := time.NewTicker(publishEvery)
	defer t.Stop()
	var last *plugintypes.Bundle
	restarts, failing := 0, false
	for {
		b, err := s.pluginBundle()
		// A publisher that was started again may have forgotten what it had.
		if n := p.plugin.Restarts(); n != restarts {
			restarts, last = n, nil
		}
		if err == nil && !proto.Equal(b, last) {
			call, cancel := context.WithTimeout(ctx, pluginPublishTimeout)
			_, err = p.client.PublishBundle(call, &bundlepublisherv1.PublishBundleRequest{Bundle: b})
			cancel()
			if err == nil {
				last = b
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
