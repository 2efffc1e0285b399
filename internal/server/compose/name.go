package compose

import (
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"strconv"
	"strings"

	composerv1 "github.com/spiffe/spire-plugin-sdk/proto/spire/plugin/server/credentialcomposer/v1"

	"github.com/rootlink/rootlink/pkg/svid"
)

const maxOID = 128 // bytes of one as text

func parseOID(s string) (asn1.ObjectIdentifier, error) {
	if len(s) > maxOID {
		return nil, fmt.Errorf("OID of %d bytes", len(s))
	}
	parts := strings.Split(s, ".")
	id := make(asn1.ObjectIdentifier, len(parts))
	for i, p := range parts {
		// 31 bits: what x509 reads back.
		n, err := strconv.ParseUint(p, 10, 31)
		if err != nil || strconv.FormatUint(n, 10) != p {
			return nil, fmt.Errorf("%q is no OID", s)
		}
		id[i] = int(n)
	}
	if _, err := asn1.Marshal(id); err != nil {
		return nil, fmt.Errorf("%q is no OID", s)
	}
	return id, nil
}

// toName bounds a name before it is encoded. No subject is not an empty one: a
// composer that leaves it out has lost it.
func toName(n *composerv1.DistinguishedName) (pkix.Name, error) {
	if n == nil {
		return pkix.Name{}, errors.New("missing")
	}
	out := pkix.Name{
		Country: n.Country, Organization: n.Organization, OrganizationalUnit: n.OrganizationalUnit, Locality: n.Locality,
		Province: n.Province, StreetAddress: n.StreetAddress, PostalCode: n.PostalCode, SerialNumber: n.SerialNumber, CommonName: n.CommonName,
	}
	size := len(n.SerialNumber) + len(n.CommonName)
	for _, list := range [][]string{n.Country, n.Organization, n.OrganizationalUnit, n.Locality, n.Province, n.StreetAddress, n.PostalCode} {
		for _, v := range list {
			size += len(v) + 8
		}
	}
	for _, x := range n.ExtraNames {
		if size += len(x.GetStringValue()) + len(x.GetOid()); size > svid.MaxComposed {
			break
		}
		id, err := parseOID(x.GetOid())
		if err != nil {
			return pkix.Name{}, err
		}
		out.ExtraNames = append(out.ExtraNames, pkix.AttributeTypeAndValue{Type: id, Value: x.GetStringValue()})
	}
	if size > svid.MaxComposed {
		return pkix.Name{}, fmt.Errorf("more than %d bytes", svid.MaxComposed)
	}
	return out, nil
}

func fromName(n pkix.Name) *composerv1.DistinguishedName {
	out := &composerv1.DistinguishedName{
		Country: n.Country, Organization: n.Organization, OrganizationalUnit: n.OrganizationalUnit, Locality: n.Locality,
		Province: n.Province, StreetAddress: n.StreetAddress, PostalCode: n.PostalCode, SerialNumber: n.SerialNumber, CommonName: n.CommonName,
	}
	for _, x := range n.ExtraNames {
		if v, ok := x.Value.(string); ok {
			out.ExtraNames = append(out.ExtraNames, &composerv1.AttributeTypeAndValue{Oid: x.Type.String(), StringValue: v})
		}
	}
	return out
}
