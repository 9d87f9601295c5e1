// Package eventloop runs short exchanges on event loops: one loop a processor, each
// with an epoll instance and connections of its own, as nginx's workers have them.
//
// The work on a connection is written as if it could block. It runs as a Task, a
// coroutine of the loop: where a Conn has nothing to read, or no room to write, the
// task parks and the loop goes on with another one, without the scheduler. A
// TCP connection that waits for its next request has no task, hence no stack.
//
// A Listener has the loops accept, so that a connection begins on the loop that it
// is to stay on; Adopt brings one there that was made elsewhere, and a Raw is any
// other socket that a task is to read.
//
// What a task does other than by its connections must not take long, since all of
// the loop waits for it: Task.Block and Task.Detach take a task to a goroutine of
// its own, where it may wait for anything. Connections can be used from there too,
// a bit slower.
package eventloop
