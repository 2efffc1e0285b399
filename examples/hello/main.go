// Hello is what the demo builds, signs, verifies and tampers with.
package main

import (
	"fmt"

	"example.org/greet"
)

func main() { fmt.Println(greeting()) }

func greeting() string { return greet.From("a build whose hardware can be named") }
