package tpm

import (
	"bytes"
	"context"
	"errors"
	"fmt"

	"github.com/google/go-tpm/tpm2"
)

// ActivateCredential returns the secret that a server sealed to this TPM's EK
// and AK. It proves nothing but that both live here.
func (d *Device) ActivateCredential(ctx context.Context, blob, encryptedSecret []byte) ([]byte, error) {
	const limit = 1024 // a sealed digest and an RSA-4096 ciphertext fit
	if len(blob) > limit || len(encryptedSecret) > limit {
		return nil, fmt.Errorf("credential: %w", ErrTooLarge)
	}
	return do(ctx, d, "activate credential", func(s *state) ([]byte, error) {
		return s.activate(blob, encryptedSecret)
	})
}

func (s *state) activate(blob, encryptedSecret []byte) ([]byte, error) {
	ek, err := s.readEK()
	if err != nil {
		return nil, err
	}
	spec := ek.spec
	h, pub, name, err := s.createEK(&spec)
	if err != nil {
		return nil, err
	}
	defer s.flush(h)
	if !bytes.Equal(tpm2.Marshal(pub), ek.Public) {
		s.ek, s.props = nil, nil
		return nil, ErrTPMChanged
	}
	var rsp *tpm2.ActivateCredentialResponse
	err = s.withAK(func(f *akFile, ak tpm2.TPMHandle) error {
		policy, done, err := s.ekSession(&spec)
		if err != nil {
			return err
		}
		rsp, err = tpm2.ActivateCredential{
			// Encrypted on the way out under the AK's authorization value.
			ActivateHandle: f.handle(ak, tpm2.AESEncryption(128, tpm2.EncryptOut)),
			KeyHandle:      tpm2.AuthHandle{Handle: h, Name: name, Auth: policy},
			CredentialBlob: tpm2.TPM2BIDObject{Buffer: blob},
			Secret:         tpm2.TPM2BEncryptedSecret{Buffer: encryptedSecret},
		}.Execute(s.conn)
		done()
		return err
	})
	if err != nil {
		for _, rc := range []tpm2.TPMRC{tpm2.TPMRCIntegrity, tpm2.TPMRCValue, tpm2.TPMRCSize, tpm2.TPMRCECCPoint, tpm2.TPMRCInsufficient} {
			if errors.Is(err, rc) {
				return nil, fmt.Errorf("%w: %w", ErrCredential, err)
			}
		}
		return nil, err
	}
	return rsp.CertInfo.Buffer, nil
}

// ekSession starts a policy session that satisfies the EK's authPolicy. done
// ends it.
func (s *state) ekSession(spec *ekSpec) (sess tpm2.Session, done func(), err error) {
	sess, end, err := tpm2.PolicySession(s.conn, spec.policy.hash, 16)
	if err != nil {
		return nil, nil, fmt.Errorf("policy session: %w", err)
	}
	finish := func() {
		if err := end(); err != nil && !isConnError(err) {
			s.d.log.Warn("cannot end a TPM session", "error", err)
			s.fresh = true
		}
	}
	if _, err := (tpm2.PolicySecret{
		AuthHandle:    tpm2.AuthHandle{Handle: tpm2.TPMRHEndorsement, Auth: tpm2.PasswordAuth(nil)},
		PolicySession: sess.Handle(),
		NonceTPM:      sess.NonceTPM(),
	}).Execute(s.conn); err != nil {
		finish()
		return nil, nil, hierarchy("endorsement authorization", err)
	}
	if spec.policy.or != nil {
		if _, err := (tpm2.PolicyOr{
			PolicySession: sess.Handle(),
			PHashList:     tpm2.TPMLDigest{Digests: spec.policy.or},
		}).Execute(s.conn); err != nil {
			finish()
			return nil, nil, fmt.Errorf("EK policy: %w", err)
		}
	}
	return sess, finish, nil
}
