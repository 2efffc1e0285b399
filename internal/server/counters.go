package server

import (
	"sync"
	"sync/atomic"
)

// counters counts by name. The set of names is fixed by the code, so it does
// not grow with what callers send.
type counters struct{ m sync.Map } // name → *atomic.Uint64

func (c *counters) add(name string) {
	v, ok := c.m.Load(name)
	if !ok {
		v, _ = c.m.LoadOrStore(name, new(atomic.Uint64))
	}
	v.(*atomic.Uint64).Add(1)
}

func (c *counters) all() map[string]uint64 {
	out := make(map[string]uint64)
	c.m.Range(func(k, v any) bool {
		out[k.(string)] = v.(*atomic.Uint64).Load()
		return true
	})
	return out
}
