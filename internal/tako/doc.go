// Package tako holds the words of the domain: the ids, the states and the
// errors that every process of tako agrees on. It imports nothing of ours.
//
// An id is made by its one parser, so a value that exists is valid. A state is
// one of the constants below and travels as its text.
package tako
