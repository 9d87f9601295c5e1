// Package release reads and writes what one release is on disk: its folder, its
// manifest app.json, and beside it the app's secrets and the link to the serving
// release. It checks all it reads, since a release is made by others, and says in
// its errors what to correct. It runs nothing and keeps nothing in memory.
//
// Which release serves, and when, is for others.
package release
