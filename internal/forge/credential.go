package forge

import (
	"bytes"
	"crypto"
	"crypto/aes"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/hmac"
	"crypto/rsa"
	"encoding/binary"
	"errors"

	"github.com/google/go-tpm/tpm2"
)

// ErrActivate means that a credential is not for this EK and AK.
var ErrActivate = errors.New("forge: TPM_RC_INTEGRITY: the credential is for another EK or AK")

// ActivateCredential does what TPM2_ActivateCredential does with this TPM's EK
// and AK (Part 1, credential protection).
func (t *TPM) ActivateCredential(blob, encryptedSecret []byte) ([]byte, error) {
	h := crypto.SHA256
	keyBits := 128
	if t.ekPublic.NameAlg == tpm2.TPMAlgSHA384 {
		h, keyBits = crypto.SHA384, 256
	}
	seed, err := t.decapsulate(h, encryptedSecret)
	if err != nil {
		return nil, err
	}
	mac, enc, err := cut2B(blob)
	if err != nil {
		return nil, err
	}
	m := hmac.New(h.New, tpm2.KDFa(h, seed, "INTEGRITY", nil, nil, h.Size()*8))
	m.Write(enc)
	m.Write(t.AKName)
	if !hmac.Equal(m.Sum(nil), mac) {
		return nil, ErrActivate
	}
	block, err := aes.NewCipher(tpm2.KDFa(h, seed, "STORAGE", t.AKName, nil, keyBits))
	if err != nil {
		return nil, err
	}
	// CFB with a zero IV: each block is masked with the encryption of the one before.
	plain, iv := make([]byte, len(enc)), make([]byte, aes.BlockSize)
	for at := 0; at < len(enc); at += aes.BlockSize {
		end := min(at+aes.BlockSize, len(enc))
		mask := make([]byte, aes.BlockSize)
		block.Encrypt(mask, iv)
		for i := at; i < end; i++ {
			plain[i] = enc[i] ^ mask[i-at]
		}
		copy(iv, enc[at:end])
	}
	secret, rest, err := cut2B(plain)
	if err != nil || len(rest) != 0 {
		return nil, ErrActivate
	}
	return secret, nil
}

func (t *TPM) decapsulate(h crypto.Hash, encrypted []byte) ([]byte, error) {
	switch k := t.ek.(type) {
	case *rsa.PrivateKey:
		seed, err := k.Decrypt(nil, encrypted, &rsa.OAEPOptions{Hash: h, Label: []byte("IDENTITY\x00")})
		if err != nil {
			return nil, ErrActivate
		}
		return seed, nil
	case *ecdsa.PrivateKey:
		x, rest, err := cut2B(encrypted)
		if err != nil {
			return nil, err
		}
		y, rest, err := cut2B(rest)
		if err != nil || len(rest) != 0 {
			return nil, ErrActivate
		}
		priv, err := k.ECDH()
		if err != nil {
			return nil, err
		}
		peer, err := priv.Curve().NewPublicKey(append(append([]byte{4}, x...), y...))
		if err != nil {
			return nil, ErrActivate
		}
		z, err := priv.ECDH(peer)
		if err != nil {
			return nil, ErrActivate
		}
		return tpm2.KDFe(h, z, "IDENTITY", x, pointX(priv.PublicKey()), h.Size()*8), nil
	}
	return nil, errors.New("forge: the TPM has no EK")
}

func pointX(k *ecdh.PublicKey) []byte {
	raw := k.Bytes()[1:]
	return bytes.Clone(raw[:len(raw)/2])
}

// cut2B takes a TPM2B off the front of b.
func cut2B(b []byte) (content, rest []byte, err error) {
	if len(b) < 2 || len(b)-2 < int(binary.BigEndian.Uint16(b)) {
		return nil, nil, ErrActivate
	}
	n := 2 + int(binary.BigEndian.Uint16(b))
	return b[2:n], b[n:], nil
}
