package tpm

import (
	"errors"
	"fmt"
	"syscall"

	"github.com/google/go-tpm/tpm2"

	"github.com/rootlink/rootlink/internal/files"
)

// Outcomes a caller branches on. Each is wrapped with what happened; Hint turns
// one into what a person can do about it.
var (
	// ErrClosed means that the Device was closed.
	ErrClosed = errors.New("tpm device is closed")
	// ErrAddress means that the device flag cannot be read.
	ErrAddress = errors.New("not a TPM device address")
	// ErrUnreachable means that no TPM answers at the address.
	ErrUnreachable = errors.New("TPM cannot be reached")
	// ErrShared means that other users of this host can open the TPM device,
	// which makes each of them this node.
	ErrShared = errors.New("other users can open the TPM")
	// ErrDataDirLocked means that another process uses the data directory.
	ErrDataDirLocked = errors.New("data directory is in use by another process")
	// ErrLockout is TPM_RC_LOCKOUT: the TPM's dictionary attack protection is active.
	ErrLockout = errors.New("TPM is in dictionary-attack lockout")
	// ErrNotStarted is TPM_RC_INITIALIZE: nobody has sent TPM2_Startup.
	ErrNotStarted = errors.New("TPM has not been started")
	// ErrFailure is TPM_RC_FAILURE: the TPM's self-test failed.
	ErrFailure = errors.New("TPM is in failure mode")
	// ErrHierarchyAuth means that the endorsement hierarchy is disabled or has
	// an authorization value that we do not know.
	ErrHierarchyAuth = errors.New("TPM's endorsement hierarchy cannot be used")
	// ErrBankDisabled means that a requested PCR bank or PCR does not exist or is
	// not allocated. A TPM quotes such a selection without complaint, as nothing.
	ErrBankDisabled = errors.New("PCR bank is not enabled in this TPM")
	// ErrPCRsChanging means that the PCRs never held still long enough to quote them.
	ErrPCRsChanging = errors.New("PCR values keep changing while they are quoted")
	// ErrEKMismatch means that the EK certificate in NV is for another key than
	// the one this TPM makes from the standard template.
	ErrEKMismatch = errors.New("EK certificate does not belong to this TPM's EK")
	// ErrTPMChanged means that another TPM answers than the one first seen.
	ErrTPMChanged = errors.New("another TPM answers at this address")
	// ErrNoDataDir means that the operation needs an AK and the Device was
	// opened without a data directory.
	ErrNoDataDir = errors.New("no data directory: this device handle has no attestation key")
	// ErrCredential means that TPM2_ActivateCredential refused the credential:
	// it is for another EK or another AK.
	ErrCredential = errors.New("credential is not for this TPM's EK and AK")
	// ErrTooLarge means that something read from the host or TPM exceeds its limit.
	ErrTooLarge = files.ErrTooLarge
)

// connError is a failure of the connection, not of the TPM: the command may be
// tried again on a new one.
type connError struct{ err error }

func (e *connError) Error() string { return e.err.Error() }
func (e *connError) Unwrap() error { return e.err }

func isConnError(err error) bool {
	var c *connError
	return errors.As(err, &c)
}

// typed wraps a TPM response code in the sentinel that callers branch on.
func typed(what string, err error) error {
	if err == nil {
		return nil
	}
	switch {
	case errors.Is(err, ErrLockout), errors.Is(err, ErrHierarchyAuth), errors.Is(err, ErrNotStarted), errors.Is(err, ErrFailure):
		return fmt.Errorf("%s: %w", what, err)
	case errors.Is(err, tpm2.TPMRCLockout):
		return fmt.Errorf("%s: %w: %w", what, ErrLockout, err)
	case errors.Is(err, tpm2.TPMRCInitialize):
		return fmt.Errorf("%s: %w: %w", what, ErrNotStarted, err)
	case errors.Is(err, tpm2.TPMRCFailure):
		return fmt.Errorf("%s: %w: %w", what, ErrFailure, err)
	case errors.Is(err, tpm2.TPMRCHierarchy):
		return fmt.Errorf("%s: %w: %w", what, ErrHierarchyAuth, err)
	}
	return fmt.Errorf("%s: %w", what, err)
}

// hierarchy is typed for commands authorised by the endorsement hierarchy's
// own value, where a failed authorization means that an owner has set one.
func hierarchy(what string, err error) error {
	if errors.Is(err, tpm2.TPMRCBadAuth) || errors.Is(err, tpm2.TPMRCAuthFail) {
		return fmt.Errorf("%s: %w: %w", what, ErrHierarchyAuth, err)
	}
	return typed(what, err)
}

// Hint says what a person can do about err, or "" when there is nothing to add.
func Hint(err error) string {
	switch {
	case errors.Is(err, ErrAddress):
		return "use /dev/tpmrm0, unix:/path/to/socket or tcp:HOST:PORT"
	case errors.Is(err, ErrShared):
		return "restrict the device or socket to this user (chmod 0600), or allow a shared device in the agent's configuration if every user of this host may act as this node"
	case errors.Is(err, ErrDataDirLocked):
		return "stop the other agent, or give each agent its own data directory (one TPM can be one node of a trust domain only)"
	case errors.Is(err, ErrLockout):
		return "wait for the lockout interval, or reset it with: tpm2_dictionarylockout --clear-lockout"
	case errors.Is(err, ErrNotStarted):
		return "firmware does this at boot; start swtpm with --flags not-need-init,startup-clear"
	case errors.Is(err, ErrFailure):
		return "switch the machine off and on; if it stays, the TPM is defective (tpm2_gettestresult)"
	case errors.Is(err, ErrHierarchyAuth):
		return "the endorsement hierarchy must be enabled with an empty authorization value: check the firmware setup, or tpm2_changeauth -c endorsement"
	case errors.Is(err, ErrBankDisabled):
		return "choose a bank that is enabled (tpm2_getcap pcrs), or enable it in the firmware setup"
	case errors.Is(err, ErrEKMismatch):
		return "the EK certificate was replaced or written for another TPM: ask its maker for the right one, or remove it and put the EK's hash on the server's allow-list"
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		return "the disk of the data directory is full: free some space"
	case errors.Is(err, ErrUnreachable):
		return "is the path right, the TPM enabled in the firmware setup (or the swtpm process running), and are we allowed to open it?"
	}
	return ""
}
