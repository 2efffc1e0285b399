package tlog

// BeforeAnswer has f run between a published entry and its answer.
func BeforeAnswer(l *Log, f func()) { l.beforeAnswer = f }

// ReadRequest is readRequest.
var ReadRequest = readRequest
