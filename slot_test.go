package taskexec

import (
	"context"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
)

// Whatever is given back and taken meanwhile, a waiting job is found at its
// place, one that has started is not, and the rest is taken in the order it came.
func TestAWaitingJobIsFoundAtItsPlace(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	var q jobs
	places := make(map[int]int) // of those that wait and of those that have started
	var waiting, started []int
	for number := range 20_000 {
		places[number] = q.end()
		q.push(job{number: number})
		waiting = append(waiting, number)
		for rnd.IntN(3) > 0 && len(waiting) > 0 {
			if rnd.IntN(4) == 0 {
				var j job
				if !q.next(&j) || j.number != waiting[0] {
					t.Fatalf("next gave %v, want task %d", j, waiting[0])
				}
				started, waiting = append(started, j.number), waiting[1:]
				continue
			}
			i := rnd.IntN(len(waiting))
			j := q.giveBack(places[waiting[i]])
			if j == nil || j.number != waiting[i] {
				t.Fatalf("at the place of task %d there is %v", waiting[i], j)
			}
			waiting = slices.Delete(waiting, i, i+1)
			q.clean(func(number, place int) { places[number] = place })
		}
		if len(started) > 0 {
			if n := started[rnd.IntN(len(started))]; q.giveBack(places[n]) != nil {
				t.Fatalf("task %d was given back, and has started", n)
			}
		}
		if n := q.len(); n > 2*len(waiting)+1 {
			t.Fatalf("the list is %d long, and %d wait", n, len(waiting))
		}
	}
}

// It would be encoded with the session locked, whatever its length.
func TestAnOutputThatCannotFitIsNotEncoded(t *testing.T) {
	s := &workerSession{worker: NewWorker(HandlerFunc(func(context.Context, Task) (string, error) { return "", nil }))}
	s.hello.MaxLine = 4096
	s.reportSettled(&message{verb: verbDone, task: 7, text: strings.Repeat("\n", 1<<20)})
	m, err := parseMessage(strings.TrimSuffix(string(s.out), "\n"))
	if err != nil || m.verb != verbFail || m.task != 7 || m.word != KindOutput || cap(s.out) > 1<<10 {
		t.Errorf("the report is %+v, %v, in a buffer of %d bytes", m, err, cap(s.out))
	}
}
