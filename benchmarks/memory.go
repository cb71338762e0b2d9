package main

import (
	"bytes"
	"os"
	"strconv"
)

// residentMemory is what of a process is in physical memory, in bytes: now, and
// at its highest. Both are 0 where the system does not say it, that is
// elsewhere than on Linux.
type residentMemory struct {
	Now, Highest int64
}

func ownMemory() (m residentMemory) {
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return m
	}
	for line := range bytes.Lines(status) {
		key, value, _ := bytes.Cut(line, []byte(":"))
		kib, _ := strconv.ParseInt(string(bytes.TrimSuffix(bytes.TrimSpace(value), []byte(" kB"))), 10, 64)
		switch string(key) {
		case "VmRSS":
			m.Now = kib << 10
		case "VmHWM":
			m.Highest = kib << 10
		}
	}
	return m
}
