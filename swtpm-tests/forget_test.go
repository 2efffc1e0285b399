package stories

import (
	"database/sql"

	"github.com/rogpeppe/go-internal/testscript"
	_ "modernc.org/sqlite" // the driver "sqlite"
)

// forget DB KIND: takes one record of an issued certificate out of a server's
// database, as somebody would who has certified what he wants nobody to know.
func cmdForget(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: forget DB KIND")
	}
	db, err := sql.Open("sqlite", ts.MkAbs(args[0]))
	ts.Check(err)
	defer db.Close()
	r, err := db.Exec(`DELETE FROM certificates WHERE digest = (SELECT digest FROM certificates WHERE kind = ? LIMIT 1)`, args[1])
	ts.Check(err)
	if n, err := r.RowsAffected(); err != nil || n != 1 {
		ts.Fatalf("forgot %d records (%v)", n, err)
	}
}
