// Hello is what the demo builds, signs, verifies and tampers with.
package main

import "fmt"

func main() { fmt.Println("hello, from a build whose hardware can be named") }
