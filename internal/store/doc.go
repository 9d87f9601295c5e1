// Package store keeps what must survive a crash: apps and their routes, the
// rollout that is under way, uids and ports given out, the upgrade lock. It is
// one SQLite file, written by one master; who that is, the lock of the data
// root decides before Open is called.
//
// It promises: a call that changes something is one transaction, and when it
// returns nil the change survives a power cut. A call that returns an error
// changed nothing. A damaged file is never taken for an empty one: the newest
// good backup replaces it, or Open fails. Stop and delete work on a full disk.
//
// Times are kept to the millisecond and come back in UTC; the zero time stays
// zero. What the values mean, and whether a route is well formed, is for others
// to say. Secrets are not kept here, only their hash.
package store
