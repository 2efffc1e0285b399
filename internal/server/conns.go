package server

import (
	"container/list"
	"log/slog"
	"net"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/credentials"
)

const (
	// handshakeTimeout is how long a connection has to become TLS and HTTP/2.
	handshakeTimeout = 10 * time.Second
	// otherFiles are left to the database, the sockets and the logs when the
	// limit of open files is smaller than that of connections.
	otherFiles = 128
	// fullEvery is how often the log says that connections had to go.
	fullEvery = time.Minute
)

// connListener bounds the connections that are open. Who has shown no client
// certificate makes room for who comes next: the oldest connection of the address
// that has most of them, so that nobody keeps agents out by connecting and
// staying, and few addresses drive nobody else out; agents that are in stay in.
type connListener struct {
	net.Listener
	most, mostOfAddress int
	count               *counters
	log                 *slog.Logger
	now                 func() time.Time

	mu     sync.Mutex
	open   int                   // guarded by mu
	by     map[string]*addrConns // guarded by mu, by address
	guests list.List             // guarded by mu; of *serverConn without a certificate, oldest first
	crowds []map[*addrConns]bool // guarded by mu; at n, the addresses with n guests, n ≥ 1; the last is not empty
	said   time.Time             // guarded by mu; when the log last told of a lack of room
}

// addrConns are the connections of one address, guarded by connListener.mu.
type addrConns struct {
	open   int
	guests list.List
}

// serverConn is a connection that is counted until it is closed.
type serverConn struct {
	net.Conn
	l    *connListener
	from string

	// Guarded by l.mu; nil once a certificate was shown, or when it is closed.
	inAll, inAddress *list.Element
	gone             bool // guarded by l.mu
}

func newConnListener(l net.Listener, c *settings, count *counters) *connListener {
	most := c.MaxConnections
	var files unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &files); err == nil && files.Cur < uint64(most+otherFiles) {
		most = max(1, int(files.Cur)-otherFiles)
		c.Log.Info("fewer connections than --max-connections: the limit of open files is lower", "connections", most, "open_files", files.Cur)
	}
	return &connListener{
		Listener: l, most: most, mostOfAddress: min(most, c.MaxConnectionsOfAddress),
		count: count, log: c.Log, now: c.Now, by: make(map[string]*addrConns),
	}
}

// Accept never fails for lack of room.
func (l *connListener) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if x := l.admit(c); x != nil {
			return x, nil
		}
		c.Close()
	}
}

// admit counts c in, and closes a guest for it if it must. Without one to close
// it returns nil.
func (l *connListener) admit(c net.Conn) *serverConn {
	x := &serverConn{Conn: c, l: l, from: addressOf(c.RemoteAddr())}
	l.mu.Lock()
	a := l.by[x.from]
	if a == nil {
		a = new(addrConns)
	}
	var victim *serverConn
	if from := l.guestsOf(a); from != nil {
		e := from.Front()
		if e == nil {
			l.refused("connection_refused/too_many", x.from)
			l.mu.Unlock()
			return nil
		}
		victim = e.Value.(*serverConn)
		l.remove(victim)
		l.refused("connection_closed/made_room", victim.from)
	}
	l.by[x.from] = a
	l.open++
	a.open++
	x.inAll, x.inAddress = l.guests.PushBack(x), a.guests.PushBack(x)
	l.crowd(a, a.guests.Len()-1, a.guests.Len())
	l.mu.Unlock()
	if victim != nil {
		victim.Conn.Close()
	}
	return x
}

// guestsOf returns those of whom one has to go for a connection of a, nil when
// there is room. It is called with mu held.
func (l *connListener) guestsOf(a *addrConns) *list.List {
	switch {
	case a.open >= l.mostOfAddress:
		return &a.guests
	case l.open >= l.most:
		if last := len(l.crowds) - 1; last > 1 {
			for crowd := range l.crowds[last] {
				return &crowd.guests
			}
		}
		return &l.guests // one each, or none
	}
	return nil
}

// crowd notes that a has come to have n guests, and had was before. It is called
// with mu held.
func (l *connListener) crowd(a *addrConns, had, n int) {
	if had > 0 {
		delete(l.crowds[had], a)
	}
	if n > 0 {
		for len(l.crowds) <= n {
			l.crowds = append(l.crowds, map[*addrConns]bool{})
		}
		l.crowds[n][a] = true
	}
	for last := len(l.crowds) - 1; last >= 0 && len(l.crowds[last]) == 0; last-- {
		l.crowds = l.crowds[:last]
	}
}

// refused counts, and says so now and then. It is called with mu held.
func (l *connListener) refused(what, from string) {
	l.count.add(what)
	if now := l.now(); l.said.IsZero() || now.Sub(l.said) >= fullEvery {
		l.said = now
		l.log.Warn("too many connections: new ones take the place of those without a client certificate, or are refused",
			"open", l.open, "most", l.most, "most_of_address", l.mostOfAddress, "last_from", from)
	}
}

// remove counts x out. It is called with mu held.
func (l *connListener) remove(x *serverConn) {
	if x.gone {
		return
	}
	x.gone = true
	l.settle(x)
	l.open--
	a := l.by[x.from]
	if a.open--; a.open == 0 {
		delete(l.by, x.from)
	}
}

// settle makes x no guest any more. It is called with mu held.
func (l *connListener) settle(x *serverConn) {
	if x.inAll != nil {
		l.guests.Remove(x.inAll)
		a := l.by[x.from]
		a.guests.Remove(x.inAddress)
		l.crowd(a, a.guests.Len()+1, a.guests.Len())
		x.inAll, x.inAddress = nil, nil
	}
}

func (x *serverConn) Close() error {
	x.l.mu.Lock()
	x.l.remove(x)
	x.l.mu.Unlock()
	return x.Conn.Close()
}

// connCredentials tells the listener who has shown a client certificate. Not
// before the handshake has ended: certificates are public, and until then it
// is not known that the peer has the key.
type connCredentials struct {
	credentials.TransportCredentials
}

func (c connCredentials) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	conn, info, err := c.TransportCredentials.ServerHandshake(raw)
	if err != nil {
		return conn, info, err
	}
	if tls, ok := info.(credentials.TLSInfo); ok && len(tls.State.PeerCertificates) > 0 {
		if x, ok := raw.(*serverConn); ok {
			x.l.mu.Lock()
			x.l.settle(x)
			x.l.mu.Unlock()
		}
	}
	return conn, info, nil
}
