package taskexec

import (
	"testing"
	"testing/synctest"
	"time"
)

// The tests here are those that only a fault under testdata/seeded has asked for.

func TestALeaseCountsFromWhenItsPingWasSent(t *testing.T) {
	// The coordinator may have heard nothing since the PING that it answers, so
	// what the answer takes must not lengthen the lease.
	synctest.Test(t, func(t *testing.T) {
		p, over := startLeased(t)
		p.send("RUN 0 1 0 x")
		p.expect("PING 1")
		sent := time.Now()
		time.Sleep(3 * time.Second)
		p.send("PONG 1")
		p.expect("PING 2", "PING 3", "ERROR timeout …")
		synctest.Wait()
		if want := sent.Add(8 * time.Second); !over.at.Equal(want) || over.cause != errLeaseOver {
			t.Errorf("the handler's ctx ended %v after the PING with %v, want 8s and %v", over.at.Sub(sent), over.cause, errLeaseOver)
		}
	})
}

func TestPingIsAnsweredWhileDraining(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate()
		wt := startWorker(t, g)
		p := wt.session()
		p.send("RUN 0 1 0 x")
		g.expectStarted(t, "x")
		go wt.worker.Shutdown(t.Context())
		p.expect("DRAIN")
		p.send("PING 7")
		p.expect("PONG 7")
		close(g.release)
		p.expectReports("DONE 0 x", "GOODBYE …")
		p.conn.Close()
		wt.expectServed(nil)
	})
}
