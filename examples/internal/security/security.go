// Package security has the flags of the examples that say whom a worker or a
// coordinator talks to.
package security

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"flag"
	"fmt"
	"os"

	"example.com/taskexec"
)

// Flags are the values of -tls-cert, -tls-key, -tls-ca and -insecure.
type Flags struct {
	cert, key, ca string
	insecure      bool
}

// Register adds the flags to those of the command line.
func Register() *Flags {
	f := new(Flags)
	flag.StringVar(&f.cert, "tls-cert", "", "the PEM `file` with this side's certificate, for mutual TLS; needs -tls-key and -tls-ca")
	flag.StringVar(&f.key, "tls-key", "", "the PEM `file` with the certificate's key")
	flag.StringVar(&f.ca, "tls-ca", "", "the PEM `file` with the authorities that the other side's certificate has to come from")
	flag.BoolVar(&f.insecure, "insecure", false, "allow plaintext beyond this machine, where whoever can connect to a worker can have it execute anything")
	return f
}

// Check finds fault with what was given on the command line.
func (f *Flags) Check() error {
	files := 0
	for _, name := range []string{f.cert, f.key, f.ca} {
		if name != "" {
			files++
		}
	}
	switch {
	case files != 0 && files != 3:
		return errors.New("-tls-cert, -tls-key and -tls-ca belong together")
	case files != 0 && f.insecure:
		return errors.New("-tls-cert and -insecure: want one of the two")
	}
	return nil
}

// Options reads the files.
func (f *Flags) Options() ([]taskexec.Option, error) {
	switch {
	case f.insecure:
		return []taskexec.Option{taskexec.WithInsecure()}, nil
	case f.cert == "":
		return nil, nil // plaintext, and only on this machine
	}
	cert, err := tls.LoadX509KeyPair(f.cert, f.key)
	if err != nil {
		return nil, err
	}
	pem, err := os.ReadFile(f.ca)
	if err != nil {
		return nil, err
	}
	authorities := x509.NewCertPool()
	if !authorities.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("%s: no certificate in it", f.ca)
	}
	// The same config serves workers, which look at ClientCAs, and
	// coordinators, which look at RootCAs.
	return []taskexec.Option{taskexec.WithTLS(&tls.Config{
		Certificates: []tls.Certificate{cert},
		ClientCAs:    authorities,
		RootCAs:      authorities,
	})}, nil
}
