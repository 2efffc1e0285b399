// Package internal holds, until the code that imports them lands, the modules
// that are being adopted.
package internal

import (
	_ "github.com/digitorus/timestamp"
	_ "github.com/in-toto/in-toto-golang/in_toto"
	_ "github.com/transparency-dev/formats/log"
)
