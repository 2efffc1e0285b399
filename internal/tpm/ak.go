package tpm

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/google/go-tpm/tpm2"
)

// AK is the attestation key as the device shows it.
type AK struct {
	Name              []byte // TPM name: u16 nameAlg ‖ digest
	Public            []byte // TPMT_PUBLIC
	SPKI              []byte // DER of the same key
	ParentName        []byte
	CreationData      []byte // TPMS_CREATION_DATA
	CreationAttest    []byte // TPMS_ATTEST of TPM2_CertifyCreation by the AK itself
	CreationSignature []byte // TPMT_SIGNATURE
}

// AK returns the attestation key, making it the first time or when the TPM has
// forgotten the one on disk.
func (d *Device) AK(ctx context.Context) (*AK, error) {
	return do(ctx, d, "attestation key", func(s *state) (*AK, error) {
		f, err := s.readAK()
		if err != nil {
			return nil, err
		}
		// Loading it tells whether the TPM still knows it; if not, f is the new one.
		err = s.withAK(func(now *akFile, _ tpm2.TPMHandle) error { f = now; return nil })
		if err != nil {
			return nil, err
		}
		pub, err := tpm2.Unmarshal[tpm2.TPMTPublic](f.Public)
		if err != nil {
			return nil, err
		}
		key, err := tpm2.Pub(*pub)
		if err != nil {
			return nil, err
		}
		spki, err := x509.MarshalPKIXPublicKey(key)
		if err != nil {
			return nil, err
		}
		return &AK{
			Name: f.name, Public: f.Public, SPKI: spki, ParentName: f.ParentName,
			CreationData: f.CreationData, CreationAttest: f.CreationAttest, CreationSignature: f.CreationSig,
		}, nil
	})
}

// akTemplates in order of preference. Restricted, so that it signs nothing but
// what the TPM itself made. NoDA: its authorization value has 256 random bits,
// while without it anyone with access to the device could lock the node out of
// attesting by failing authorizations elsewhere.
func (p *properties) akTemplate() tpm2.TPMTPublic {
	t := tpm2.TPMTPublic{
		NameAlg: tpm2.TPMAlgSHA256,
		ObjectAttributes: tpm2.TPMAObject{
			FixedTPM: true, FixedParent: true, SensitiveDataOrigin: true,
			UserWithAuth: true, NoDA: true,
			Restricted: true, SignEncrypt: true,
		},
	}
	sym := tpm2.TPMTSymDefObject{Algorithm: tpm2.TPMAlgNull}
	if p.hasCurve(tpm2.TPMECCNistP256) {
		t.Type = tpm2.TPMAlgECC
		t.Parameters = tpm2.NewTPMUPublicParms(tpm2.TPMAlgECC, &tpm2.TPMSECCParms{
			Symmetric: sym, CurveID: tpm2.TPMECCNistP256,
			Scheme: tpm2.TPMTECCScheme{
				Scheme:  tpm2.TPMAlgECDSA,
				Details: tpm2.NewTPMUAsymScheme(tpm2.TPMAlgECDSA, &tpm2.TPMSSigSchemeECDSA{HashAlg: tpm2.TPMAlgSHA256}),
			},
		})
		t.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{})
		return t
	}
	t.Type = tpm2.TPMAlgRSA
	t.Parameters = tpm2.NewTPMUPublicParms(tpm2.TPMAlgRSA, &tpm2.TPMSRSAParms{
		Symmetric: sym, KeyBits: 2048,
		Scheme: tpm2.TPMTRSAScheme{
			Scheme:  tpm2.TPMAlgRSASSA,
			Details: tpm2.NewTPMUAsymScheme(tpm2.TPMAlgRSASSA, &tpm2.TPMSSigSchemeRSASSA{HashAlg: tpm2.TPMAlgSHA256}),
		},
	})
	t.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgRSA, &tpm2.TPM2BPublicKeyRSA{})
	return t
}

// parentTemplate is fixed: the storage key it makes, and so the parent name in
// the AK's creation data, depends on the TPM's endorsement seed alone. A server
// can tell by it that two EKs live in one TPM.
func (p *properties) parentTemplate() tpm2.TPMTPublic {
	if p.hasCurve(tpm2.TPMECCNistP256) {
		return tpm2.ECCSRKTemplate
	}
	return tpm2.RSASRKTemplate
}

// parent is the loaded storage key above the AK.
type parent struct {
	handle tpm2.TPMHandle
	name   tpm2.TPM2BName
	public tpm2.TPMTPublic
}

// loadParent creates the storage key in the endorsement hierarchy. In the
// owner's, the TPM would obfuscate the reset and restart counters of quotes.
// The caller flushes it.
func (s *state) loadParent() (*parent, error) {
	p, err := s.properties()
	if err != nil {
		return nil, err
	}
	rsp, err := tpm2.CreatePrimary{
		PrimaryHandle: tpm2.TPMRHEndorsement,
		InPublic:      tpm2.New2B(p.parentTemplate()),
	}.Execute(s.conn)
	if err != nil {
		return nil, hierarchy("create the AK's parent", err)
	}
	pub, err := rsp.OutPublic.Contents()
	if err != nil {
		s.flush(rsp.ObjectHandle)
		return nil, fmt.Errorf("AK's parent: %w", err)
	}
	return &parent{rsp.ObjectHandle, rsp.Name, *pub}, nil
}

// auth authorises the use of the parent. Its value is empty; the session
// is salted to the parent, so that what is sent in it does not cross the bus
// in clear.
func (p *parent) auth(dir ...tpm2.AuthOption) tpm2.AuthHandle {
	opts := append([]tpm2.AuthOption{tpm2.Salted(p.handle, p.public)}, dir...)
	return tpm2.AuthHandle{Handle: p.handle, Name: p.name, Auth: tpm2.HMAC(tpm2.TPMAlgSHA256, 16, opts...)}
}

// readAK returns the AK on disk, or makes one.
func (s *state) readAK() (*akFile, error) {
	if s.ak != nil {
		return s.ak, nil
	}
	if s.d.opts.DataDir == "" {
		return nil, ErrNoDataDir
	}
	f, err := loadAKFile(s.d.akPath())
	if errors.Is(err, errBadAKFile) {
		s.d.log.Error("attestation key file cannot be read, making a new key: the server will see another AK for this EK", "error", err)
		err = nil
	}
	if err != nil {
		return nil, err
	}
	if f == nil {
		return s.makeAK()
	}
	s.ak = f
	return f, nil
}

// makeAK creates, certifies and stores a new AK, and leaves it loaded.
func (s *state) makeAK() (*akFile, error) {
	s.unloadAK()
	s.ak, s.akContext = nil, nil
	p, err := s.properties()
	if err != nil {
		return nil, err
	}
	par, err := s.loadParent()
	if err != nil {
		return nil, err
	}
	loadedParent := par.handle
	defer func() { s.flush(loadedParent) }()

	f := &akFile{Version: akFileVersion, ParentName: slices.Clone(par.name.Buffer)}
	if f.Auth, err = newAuth(rand.Reader); err != nil {
		return nil, err
	}
	created, err := tpm2.Create{
		ParentHandle: par.auth(tpm2.AESEncryption(128, tpm2.EncryptIn)),
		InSensitive: tpm2.TPM2BSensitiveCreate{Sensitive: &tpm2.TPMSSensitiveCreate{
			UserAuth: tpm2.TPM2BAuth{Buffer: f.Auth},
		}},
		InPublic: tpm2.New2B(p.akTemplate()),
	}.Execute(s.conn)
	if err != nil {
		return nil, fmt.Errorf("create: %w", err)
	}
	f.Public = bytes.Clone(created.OutPublic.Bytes())
	f.Private = bytes.Clone(created.OutPrivate.Buffer)
	f.CreationData = bytes.Clone(created.CreationData.Bytes())
	if f.name, err = nameOf(f.Public); err != nil {
		return nil, err
	}
	h, err := s.loadBlob(f, par)
	if err != nil {
		return nil, err
	}
	s.flush(loadedParent)
	loadedParent = 0
	s.akHandle = h
	auth := f.handle(h)
	cert, err := tpm2.CertifyCreation{
		SignHandle:     auth,
		ObjectHandle:   tpm2.NamedHandle{Handle: h, Name: auth.Name},
		CreationHash:   created.CreationHash,
		InScheme:       tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgNull},
		CreationTicket: created.CreationTicket,
	}.Execute(s.conn)
	if err != nil {
		s.unloadAK()
		return nil, fmt.Errorf("certify creation: %w", err)
	}
	f.CreationAttest = bytes.Clone(cert.CertifyInfo.Bytes())
	f.CreationSig = tpm2.Marshal(cert.Signature)
	if err := f.save(s.d.akPath()); err != nil {
		s.unloadAK()
		return nil, fmt.Errorf("store: %w", err)
	}
	s.ak = f
	s.d.log.Info("made an attestation key", "name", fmt.Sprintf("%x", f.name))
	return f, nil
}

// newAuth makes an authorization value without zero bytes. go-tpm computes the
// HMAC of a session over the value up to its first zero byte, where the TPM
// drops trailing ones only, so that one value in nine would never authorise.
func newAuth(random io.Reader) ([]byte, error) {
	auth := make([]byte, 32) // 255.8 bits
	for i := range auth {
		for auth[i] == 0 {
			if _, err := io.ReadFull(random, auth[i:i+1]); err != nil {
				return nil, err
			}
		}
	}
	return auth, nil
}

// handle authorises the use of the AK by HMAC, so that its authorization value
// never crosses the bus.
func (f *akFile) handle(h tpm2.TPMHandle, opts ...tpm2.AuthOption) tpm2.AuthHandle {
	return tpm2.AuthHandle{
		Handle: h, Name: tpm2.TPM2BName{Buffer: f.name},
		Auth: tpm2.HMAC(tpm2.TPMAlgSHA256, 16, append(opts, tpm2.Auth(f.Auth))...),
	}
}

func (s *state) loadBlob(f *akFile, par *parent) (tpm2.TPMHandle, error) {
	pub, err := tpm2.Unmarshal[tpm2.TPMTPublic](f.Public)
	if err != nil {
		return 0, err
	}
	rsp, err := tpm2.Load{
		ParentHandle: par.auth(),
		InPrivate:    tpm2.TPM2BPrivate{Buffer: f.Private},
		InPublic:     tpm2.New2B(*pub),
	}.Execute(s.conn)
	if err != nil {
		return 0, fmt.Errorf("load: %w", err)
	}
	if !bytes.Equal(rsp.Name.Buffer, f.name) {
		s.flush(rsp.ObjectHandle)
		return 0, fmt.Errorf("TPM names the loaded AK %x instead of %x", rsp.Name.Buffer, f.name)
	}
	return rsp.ObjectHandle, nil
}

// loadAK makes sure that the AK is loaded: from a context saved earlier in this
// boot, else from the blob, else (the TPM was cleared or replaced) a new one.
func (s *state) loadAK() error {
	if s.akHandle != 0 {
		return nil
	}
	f, err := s.readAK()
	if err != nil || s.akHandle != 0 {
		return err
	}
	if s.akContext != nil {
		rsp, err := tpm2.ContextLoad{Context: *s.akContext}.Execute(s.conn)
		if err == nil {
			s.akHandle = rsp.LoadedHandle
			return nil
		}
		if isConnError(err) || outOfSlots(err) {
			return err
		}
		s.akContext = nil // of a boot that is over
	}
	par, err := s.loadParent()
	if err != nil {
		return err
	}
	forgotten := !bytes.Equal(par.name.Buffer, f.ParentName)
	if !forgotten {
		h, err := s.loadBlob(f, par)
		if err == nil {
			s.flush(par.handle)
			s.akHandle = h
			return nil
		}
		forgotten = errors.Is(err, tpm2.TPMRCIntegrity) || errors.Is(err, tpm2.TPMRCBinding) || errors.Is(err, tpm2.TPMRCSensitive)
		if !forgotten {
			s.flush(par.handle)
			return err
		}
	}
	s.flush(par.handle)
	s.d.log.Error("ALARM: the TPM does not know the attestation key on disk (it was cleared or replaced, or the data directory was copied from another machine): making a new key",
		"old_name", fmt.Sprintf("%x", f.name))
	s.ek = nil
	_, err = s.makeAK()
	return err
}

// withAK runs fn with the AK loaded. A TPM that was reset under a connection
// that stayed open has lost it: then it is loaded once more.
func (s *state) withAK(fn func(f *akFile, h tpm2.TPMHandle) error) error {
	for again := false; ; again = true {
		if err := s.loadAK(); err != nil {
			return err
		}
		err := fn(s.ak, s.akHandle)
		if !again && (errors.Is(err, tpm2.TPMRCReferenceH0) || errors.Is(err, tpm2.TPMRCHandle)) {
			s.akHandle = 0
			continue
		}
		return err
	}
}

// unloadAK frees the AK's slot and keeps a context to load it quickly again.
func (s *state) unloadAK() {
	if s.akHandle == 0 || s.conn == nil {
		return
	}
	if s.akContext == nil {
		if rsp, err := (tpm2.ContextSave{SaveHandle: s.akHandle}).Execute(s.conn); err == nil {
			s.akContext = &rsp.Context
		}
	}
	h := s.akHandle
	s.akHandle = 0
	s.flush(h)
}
