package taskexec

import (
	"crypto/x509"
	"encoding/asn1"
	"errors"
	"fmt"
	"slices"
	"strings"
)

// A Peer is what one certificate may be used for. See WithPeers.
type Peer struct {
	// Name is a URI or DNS name among the certificate's subject alternative
	// names, exactly as it stands there: "spiffe://example.org/worker/7",
	// "build-7.example.org". A wildcard matches nothing but its own text.
	Name string

	// Coordinator lets the peer send tasks to workers that have this list.
	Coordinator bool

	// Categories are those whose tasks coordinators with this list let the peer
	// execute.
	Categories []string
}

// WithPeers lists which certificates may be used for what: a worker takes
// sessions only from a peer whose name is listed as a coordinator, and a
// coordinator takes a worker for a category only if the worker's name is listed
// with that category. The same list can be handed to all of them. Called again,
// it adds to the list. The default is no list: see WithTLS for who may be what
// then.
//
// Only URI and DNS names among the subject alternative names count, and one that
// matches is enough; common names and other parts of the subject do not. On a
// coordinator the list takes the place of the host name: a worker may be at any
// address.
//
// It needs TLS, by WithTLS or from a dialer or listener whose connections are
// *tls.Conn and that verifies certificates. A list without TLS or an empty list
// is an error, and so is a Peer that has no name, is listed twice, is listed for
// nothing at all, or has a category that is not 1 to 255 bytes of UTF-8 without
// control characters: an error of NewCoordinator, and of a worker's Serve,
// ListenAndServe and ServeConn.
func WithPeers(peers ...Peer) Option {
	return option(func(c *commonConfig) {
		if c.peers == nil {
			c.peers = make(map[string]Peer)
		}
		if len(peers) == 0 {
			c.addError("WithPeers: no peer is listed")
		}
		for _, p := range peers {
			if p.Name == "" {
				c.addError("WithPeers: a peer has no name")
				continue
			}
			if _, ok := c.peers[p.Name]; ok {
				c.addError("WithPeers: %s is listed twice", quote(p.Name))
			}
			if !p.Coordinator && len(p.Categories) == 0 {
				c.addError("WithPeers: %s is listed for nothing; set Coordinator or Categories, or leave it out", quote(p.Name))
			}
			for _, category := range p.Categories {
				if !validCategory(category) {
					c.addError("WithPeers: %s: category %s is not 1 to %d bytes of UTF-8 without control characters", quote(p.Name), quote(category), maxNameLen)
				}
			}
			p.Categories = slices.Clone(p.Categories)
			c.peers[p.Name] = p
		}
	})
}

// coordinatorName is the name of a coordinator with these verified chains: the
// one that is listed or, without a list, its first; "" if there are no chains.
func (c *commonConfig) coordinatorName(chains [][]*x509.Certificate) (string, error) {
	names := peerNames(chains)
	if c.peers != nil {
		return c.listedName(names, "as a coordinator", func(p Peer) bool { return p.Coordinator })
	}
	if len(names) == 0 {
		return "", nil
	}
	return names[0], nil
}

// checkWorkerName refuses a worker that is not listed for category.
func (c *commonConfig) checkWorkerName(chains [][]*x509.Certificate, category string) error {
	_, err := c.listedName(peerNames(chains), "for category "+quote(category), func(p Peer) bool {
		return slices.Contains(p.Categories, category)
	})
	return err
}

// listedName is the first of names that is listed and may. The error is a
// *refusedError.
func (c *commonConfig) listedName(names []string, role string, may func(Peer) bool) (string, error) {
	for _, name := range names {
		if p, ok := c.peers[name]; ok && may(p) {
			return name, nil
		}
	}
	if len(names) == 0 {
		return "", &refusedError{errors.New("WithPeers lists names, and there is no verified certificate with a URI or DNS name")}
	}
	const most = 3 // of a peer's choice
	shown := make([]string, 0, most)
	for _, name := range names[:min(most, len(names))] {
		shown = append(shown, quote(name))
	}
	more := ""
	if n := len(names) - len(shown); n > 0 {
		more = fmt.Sprintf(" and %d more", n)
	}
	return "", &refusedError{fmt.Errorf("the certificate is for %s%s, which WithPeers does not list %s", strings.Join(shown, ", "), more, role)}
}

// peerNames are the URI and DNS names of a verified certificate; none if there
// is no chain that verifies it. Names from the subject are never looked at:
// how they are to be read is anybody's guess.
func peerNames(chains [][]*x509.Certificate) []string {
	if len(chains) == 0 || len(chains[0]) == 0 {
		return nil
	}
	cert := chains[0][0]
	return append(uriNames(cert), cert.DNSNames...)
}

// uriNames are the URIs among the subject alternative names, as they stand
// there. Those of cert.URIs are parsed, and may differ when they are put together
// again: "x#" would become "x", and "SPIFFE:" "spiffe:".
func uriNames(cert *x509.Certificate) (names []string) {
	const uri = 6 // GeneralName in RFC 5280
	for _, extension := range cert.Extensions {
		var all []asn1.RawValue
		if !extension.Id.Equal(asn1.ObjectIdentifier{2, 5, 29, 17}) {
			continue
		}
		if _, err := asn1.Unmarshal(extension.Value, &all); err != nil {
			return nil // crypto/x509 has read it, so this does not happen
		}
		for _, name := range all {
			if name.Class == asn1.ClassContextSpecific && name.Tag == uri {
				names = append(names, string(name.Bytes))
			}
		}
	}
	return names
}
