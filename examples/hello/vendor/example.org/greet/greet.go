// Package greet is a dependency, so that there is one to be listed and scanned.
package greet

// From greets.
func From(who string) string { return "hello, from " + who }
