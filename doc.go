// Package taskexec executes instructions of several categories on worker
// processes, one category after another, and says what became of each. A worker
// may die; its tasks are then executed by another. There is no broker and no
// database to run: a coordinator connects to its workers.
//
// # Vocabulary
//
// These words mean the same everywhere in this package.
//
//   - A task is one instruction to execute: a category and a text. See [Task].
//   - A category says which workers may execute a task. Unless it is given, it
//     is the instruction's first character.
//   - A group is the tasks of one category that are dispatched together, in
//     input order.
//   - A stage is a set of groups that may run at the same time. Stages run one
//     after another: one starts when every task of the one before it has its
//     outcome.
//   - A plan is the stages of a run. Its [Order] says how it is made:
//     [ByCategory] (each category is a stage), [ByInput] (each task is a stage)
//     or [Concurrent] (there is one stage).
//   - A worker executes tasks of one or more categories with a handler. It is a
//     process, or part of one. See [Worker] and [Handler].
//   - A slot is room to execute one task. A worker has one unless told otherwise.
//   - A coordinator goes through the plan. See [Coordinator]. One call of its
//     Run or Stream is a run.
//   - A session is one connection between a coordinator and a worker, for one
//     category of one run.
//   - A window is how many tasks may be in flight in a session: sent, and not
//     yet reported. It is the number of the worker's slots, plus as many tasks
//     as the worker starts, judging by its reports, within one and a half round
//     trips and about 2 ms: so a fast worker does not wait for the coordinator,
//     and a slow one keeps no task from others. At the end of a group, what
//     still waits at one worker is asked back for another that has nothing to
//     do.
//   - An attempt is one sending of a task to a worker, numbered from 1.
//   - A loss is an attempt that ended with its session, so that nobody knows
//     whether the task was executed.
//   - An outcome is how a task ended: [Done], [Failed], [Canceled], [Skipped] or
//     [Unknown]. See [Outcome].
//
// # A first program
//
// Worker and coordinator are usually processes of their own. Here they are
// one, so that the program can be run as it stands:
//
//	package main
//
//	import (
//		"context"
//		"fmt"
//		"log"
//		"net"
//
//		"example.com/taskexec"
//	)
//
//	func main() {
//		ctx := context.Background()
//
//		// In a worker process: worker.ListenAndServe(ctx, "127.0.0.1:8001")
//		worker := taskexec.NewWorker(taskexec.HandlerFunc(execute))
//		ln, err := net.Listen("tcp", "127.0.0.1:0")
//		if err != nil {
//			log.Fatal(err)
//		}
//		go worker.Serve(ctx, ln)
//
//		coordinator, err := taskexec.NewCoordinator(
//			taskexec.WithWorkers("a", ln.Addr().String()),
//			taskexec.WithWorkers("b", ln.Addr().String()))
//		if err != nil {
//			log.Fatal(err)
//		}
//		tasks, err := taskexec.ParseTasks("b1 a1 a2")
//		if err != nil {
//			log.Fatal(err)
//		}
//		report, err := coordinator.Run(ctx, tasks)
//		for _, result := range report.Results {
//			fmt.Println(result.Task.Instruction, result.Outcome, result.Output)
//		}
//		if err != nil {
//			log.Fatal(err) // not every task is Done
//		}
//	}
//
//	func execute(ctx context.Context, task taskexec.Task) (string, error) {
//		fmt.Println("executing", task.Instruction)
//		return "output of " + task.Instruction, nil
//	}
//
// It executes a1, a2 and b1, in this order, and then prints the results in the
// order of the input: b1, a1, a2.
//
// # What is promised
//
// 1. Every task given to Run ends in exactly one outcome. None is dropped
// silently. Of what Stream is given, the same is true of each task that it has
// taken from its sequence, unless its loop was left.
//
// 2. Execution is at least once: after a loss a task may be executed again, so
// handlers should be idempotent; [TaskInfo] has the key and the number to make
// them so. The recorded result is at most one, since only the session that
// holds a task can settle it. With [WithAtMostOnce] a task whose fate is not
// known is never sent again, and its outcome is Unknown.
//
// 3. No task of a later stage is sent before every task of the stage before it
// has its outcome. One worker with one slot starts the tasks of a group in
// input order, as long as nothing is sent again. Order is that of sending and
// of outcomes: an attempt cut off with its session may overlap what follows,
// until its worker has noticed the loss and its handler has returned. The
// attempt's number lets a resource refuse it.
//
// 4. Canceling Run's context reaches the handlers' contexts in one round trip,
// with its cause. What has not been started by then never is.
//
// 5. A Shutdown takes nothing new, lets running handlers finish and delivers
// their results. If its context ends first it returns an error, and it may be
// called again. A handler that ignores the end of its context keeps its slot,
// and the worker names it; after a timeout it is reported as stuck.
//
// 6. Only monotonic time decides anything. Clocks of two machines are never
// compared.
//
// # A map of the package
//
// Making tasks: [Task] is a plain struct; [ParseTasks] and [ScanTasks] read
// instructions from a text, [TaskOf] encodes a value as one. [Partition] shows
// the groups that a list of tasks makes.
//
// Executing them: [NewWorker] takes a [Handler], such as a [HandlerFunc] or one
// that [HandlerOf] makes from a function over your own types.
// [Worker.ListenAndServe], [Worker.Serve] and [Worker.ServeConn] serve;
// [Worker.Shutdown] drains; [Worker.Stats] says what the worker does. Options
// are [WithSlots], [WithCategories], [WithName] and [WithRemoteShutdown].
// Middleware is a function from a Handler to a Handler.
//
// Having them executed: [NewCoordinator] needs at least [WithWorkers].
// [Coordinator.Run] takes a slice and returns a [Report] with a [Result] for
// each task, [Coordinator.Stream] takes a sequence and returns one, and
// [Coordinator.Shutdown] stops either.
//
//   - Over which connections: [WithDialer].
//   - In what order: [WithOrder], [WithSequence].
//   - After a failure: [WithOnFailure] says what becomes of the rest,
//     [WithRetry] tries the task again, [Final] and [RetryAfter] give a handler
//     a say in that.
//   - After a lost connection: [WithAtMostOnce].
//   - For how long: [Task].Timeout, [WithTaskTimeout], [WithCancelGrace],
//     [WithWorkerWait], [WithHeartbeat], [WithHandshakeTimeout].
//   - How much at a time: [WithWindow], [WithStreamBuffer].
//   - How far it has come: [Coordinator.Snapshot] to poll, [WithObserver] to be
//     called. [WithLogger], for workers too, logs it.
//   - What becomes of the workers: [WithWorkerShutdown].
//
// Between machines, both sides need [WithTLS], and should list by [WithPeers]
// who may be a coordinator or a worker. Without TLS, whatever would leave this
// machine is refused with [ErrInsecureTransport], unless [WithInsecure] allows
// it.
//
// What went wrong: Run's error is a [*RunError]. A task's is a [*TaskError],
// around a [*RemoteError] if a handler or a worker gave the reason. A worker
// that could not be used is a [*WorkerError].
//
// Outputs, goodbyes, names of workers and [RemoteError].Text are as the other
// side sent them. The text of an error, and what is logged, is escaped and
// shortened, and can go to a terminal.
//
// Functions and options panic if only the program can be at fault, such as a
// nil handler or a negative number of slots. What may come from outside, such
// as an address, is an error: NewCoordinator's, or Serve's.
//
// The wire is lines of text, so a worker can be written in any language;
// docs/protocol.md specifies it.
//
// # What is not promised
//
// Execution exactly once: a worker can die between an effect and its report,
// and no message can tell. A coordinator that fails over: a run lives and dies
// with its process, and nothing is stored. Protection from a worker that lies,
// or from a coordinator that is let in: a handler executes whatever such a
// coordinator sends.
package taskexec
