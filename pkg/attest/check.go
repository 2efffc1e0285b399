package attest

// Outcome of one check.
type Outcome string

const (
	Passed Outcome = "passed"
	Failed Outcome = "failed"
	NotRun Outcome = "not_run"
)

// Check is one line of a verification report. Every check is listed, also after
// a failure (then NotRun).
type Check struct {
	ID      string  `json:"id"`     // stable, e.g. "quote.signature"
	Clause  string  `json:"clause"` // e.g. "TPM 2.0 Part 2, 10.12.12"
	Outcome Outcome `json:"outcome"`
	Detail  string  `json:"detail,omitempty"`
}

// CheckError is the error of Verify: the check that failed, and why.
type CheckError struct {
	ID  string
	Err error
}

// Error is the check's ID and why it failed.
func (e *CheckError) Error() string { return e.ID + ": " + e.Err.Error() }

// Unwrap returns why the check failed.
func (e *CheckError) Unwrap() error { return e.Err }

type check struct {
	id, clause string
	do         func() (detail string, skipped bool, err error)
}

// runChecks runs checks in turn until one fails; the report has them all.
func runChecks(checks []check) ([]Check, error) {
	report := make([]Check, len(checks))
	var failed error
	for i, c := range checks {
		report[i] = Check{ID: c.id, Clause: c.clause, Outcome: NotRun}
		if failed != nil {
			continue
		}
		detail, skip, err := c.do()
		report[i].Detail = detail
		switch {
		case err != nil:
			failed = &CheckError{ID: c.id, Err: err}
			report[i].Outcome, report[i].Detail = Failed, err.Error()
		case !skip:
			report[i].Outcome = Passed
		}
	}
	return report, failed
}
