package server

import (
	"context"
	"fmt"
	"log"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"
)

// The HTTP port is open to anybody and speaks plain HTTP: each answer is signed
// and public, and those who ask check it. What a stranger can cost is bounded
// by these and by each handler's own limit of the body.
const (
	maxHTTPConns          = 1024 // open connections; the oldest make room
	maxHTTPConnsOfAddress = 512
	maxHTTPHeader         = 8 << 10          // bytes
	httpHeaderTimeout     = 5 * time.Second  // to send the header
	httpReadTimeout       = 15 * time.Second // and the body
	httpWriteTimeout      = 30 * time.Second // from the header to the end of the answer
	httpIdleTimeout       = time.Minute
)

// checkHTTP completes the settings of the HTTP port.
func (s *settings) checkHTTP() error {
	if s.HTTPListen == "" {
		if s.HTTPURL != "" {
			return fmt.Errorf("an HTTP URL, and no HTTP port to listen on")
		}
		return nil
	}
	if _, _, err := net.SplitHostPort(s.HTTPListen); err != nil {
		return fmt.Errorf("HTTP listen address: %w", err)
	}
	if s.HTTPURL == "" {
		return nil
	}
	u, err := url.Parse(s.HTTPURL)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" {
		return fmt.Errorf("HTTP URL %q: want http://HOST:PORT or https://HOST, with a path if need be", s.HTTPURL)
	}
	s.HTTPURL = strings.TrimRight(s.HTTPURL, "/")
	return nil
}

// listenHTTP opens the HTTP port, if there is to be one.
func (s *Server) listenHTTP() error {
	if s.cfg.HTTPListen == "" {
		return nil
	}
	l, err := net.Listen("tcp", s.cfg.HTTPListen)
	if err != nil {
		return fmt.Errorf("HTTP port: %w", err)
	}
	bounded := *s.cfg
	bounded.MaxConnections = min(bounded.MaxConnections, maxHTTPConns)
	bounded.MaxConnectionsOfAddress = min(bounded.MaxConnectionsOfAddress, maxHTTPConnsOfAddress)
	s.http = newConnListener(l, &bounded, &s.count)
	if a, ok := l.Addr().(*net.TCPAddr); ok && a.IP.IsUnspecified() && s.cfg.HTTPURL == "" {
		s.cfg.Log.Warn("agents are told an address that no other machine can reach", "url", s.HTTPURL(),
			"hint", "--http-url names the address that recorders reach the HTTP port by")
	}
	return nil
}

// mountHTTP puts on mux what the HTTP port offers.
func (s *Server) mountHTTP(mux *http.ServeMux) {
	if s.tsa != nil {
		mux.Handle("/tsa", s.tsa)
	}
	if s.logHandler != nil {
		// The handler sees /checkpoint, /tile/…
		mux.Handle("/log/", http.StripPrefix("/log", s.logHandler))
	}
}

func (s *Server) newHTTP() *http.Server {
	mux := http.NewServeMux()
	s.mountHTTP(mux)
	return &http.Server{
		Handler:           mux,
		ReadHeaderTimeout: httpHeaderTimeout, ReadTimeout: httpReadTimeout,
		WriteTimeout: httpWriteTimeout, IdleTimeout: httpIdleTimeout,
		MaxHeaderBytes: maxHTTPHeader,
		ErrorLog:       log.New(debugLog{s.cfg.Log}, "", 0),
	}
}

// debugLog takes what net/http says about strangers' mistakes.
type debugLog struct{ log *slog.Logger }

func (d debugLog) Write(p []byte) (int, error) {
	d.log.Debug("HTTP port", "event", strings.TrimSpace(string(p)))
	return len(p), nil
}

// stopHTTP lets requests in progress finish, for as long as calls may.
func stopHTTP(h *http.Server) {
	ctx, cancel := context.WithTimeout(context.Background(), stopTimeout)
	defer cancel()
	if h.Shutdown(ctx) != nil {
		h.Close()
	}
}

// HTTPAddr is the address of the HTTP port with its real port, nil without one.
func (s *Server) HTTPAddr() net.Addr {
	if s.http == nil {
		return nil
	}
	return s.http.Addr()
}

// HTTPURL is the base URL that agents are told, empty without an HTTP port.
func (s *Server) HTTPURL() string {
	switch {
	case s.http == nil:
		return ""
	case s.cfg.HTTPURL != "":
		return s.cfg.HTTPURL
	}
	return "http://" + s.http.Addr().String()
}

// logURL is the base of the transparency log, empty when there is none.
func (s *Server) logURL() string {
	if s.logHandler == nil || s.http == nil {
		return ""
	}
	return s.HTTPURL() + "/log"
}
