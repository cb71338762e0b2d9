package taskexec

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"
)

// The tests here are those that only a fault under testdata/seeded has asked for.

func TestALeaseCountsFromWhenItsPingWasSent(t *testing.T) {
	// The coordinator may have heard nothing since the PING that it answers, so
	// what the answer takes must not lengthen the lease.
	synctest.Test(t, func(t *testing.T) {
		var ended time.Time
		var cause error
		wt := startWorker(t, HandlerFunc(func(ctx context.Context, _ Task) (string, error) {
			<-ctx.Done()
			ended, cause = time.Now(), context.Cause(ctx)
			return "", ctx.Err()
		}))
		p := wt.stranger()
		p.send(`HELLO taskexec/1 {"category":"a","timeout_ms":10000}`)
		p.expect("WELCOME taskexec/1 …")
		p.send("RUN 0 1 0 x")
		p.expect("PING 1")
		sent := time.Now()
		time.Sleep(3 * time.Second)
		p.send("PONG 1")
		p.expect("PING 2", "PING 3", "ERROR timeout …")
		synctest.Wait()
		if want := sent.Add(8 * time.Second); !ended.Equal(want) || !errors.Is(cause, errLeaseOver) {
			t.Errorf("the handler's ctx ended %v after the PING with %v, want 8s and %v", ended.Sub(sent), cause, errLeaseOver)
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
