package main

import "testing"

func TestGreeting(t *testing.T) {
	if got := greeting(); got != "hello, from a build whose hardware can be named" {
		t.Errorf("%q", got)
	}
}
