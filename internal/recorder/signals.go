package recorder

import (
	"os"
	"os/signal"
	"sync"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"
)

// signals passes on what was sent to the recorder and meant for the tool, and
// stops the recorder when the tool has stopped.
type signals struct {
	pidfd   int // of the tool
	ch      chan os.Signal
	stopped atomic.Bool // the tool is stopped as a job
	wg      sync.WaitGroup
}

// forwardSignals starts passing signals on. The terminal sends its signals to
// the whole process group, tool included, so those are only kept from ending
// or stopping the recorder before the tool has done so.
func forwardSignals(pid int) (*signals, error) {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return nil, os.NewSyscallError("pidfd_open", err)
	}
	s := &signals{pidfd: fd, ch: make(chan os.Signal, 16)}
	for _, sig := range []os.Signal{
		unix.SIGINT, unix.SIGQUIT, unix.SIGTERM, unix.SIGHUP, unix.SIGUSR1, unix.SIGUSR2,
		unix.SIGTSTP, unix.SIGTTIN, unix.SIGTTOU, unix.SIGCONT,
	} {
		// What the caller ignores (nohup) the tool is to ignore too, and a
		// handler of ours would undo that.
		if !signal.Ignored(sig) {
			signal.Notify(s.ch, sig)
		}
	}
	s.wg.Go(s.loop)
	return s, nil
}

func (s *signals) loop() {
	for sig := range s.ch {
		n := sig.(syscall.Signal)
		switch n {
		case unix.SIGINT, unix.SIGQUIT, unix.SIGTSTP:
			if inForeground() {
				continue // the tool has had it from the terminal
			}
		case unix.SIGTTIN, unix.SIGTTOU:
			continue // the terminal's, always for the whole group
		case unix.SIGCONT:
			if !s.stopped.Load() {
				continue // sent to the group: the tool has had it
			}
		}
		unix.PidfdSendSignal(s.pidfd, n, nil, 0)
	}
}

// toolStopped follows the tool into a stop. Only now, not when ^Z arrives: a
// shell takes the terminal back as soon as it sees us stopped, and by then the
// tool must have put it in order and read its last.
//
// Without a terminal there is no shell that would wake us again.
func (s *signals) toolStopped(sig unix.Signal) {
	s.stopped.Store(true)
	if sig == unix.SIGSTOP && !inForeground() || sig != unix.SIGSTOP && !haveTerminal() {
		return
	}
	unix.Kill(unix.Getpid(), unix.SIGSTOP)
}

func (s *signals) stop() {
	signal.Stop(s.ch)
	close(s.ch)
	s.wg.Wait()
	unix.Close(s.pidfd)
}

// inForeground reports whether our process group is the one the terminal sends
// its signals to.
func inForeground() bool {
	pgrp, ok := foreground()
	return ok && pgrp == unix.Getpgrp()
}

func haveTerminal() bool {
	_, ok := foreground()
	return ok
}

// foreground is the process group in the foreground of our terminal, if any.
func foreground() (pgrp int, ok bool) {
	fd, err := unix.Open("/dev/tty", unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NOCTTY, 0)
	if err != nil {
		return 0, false
	}
	defer unix.Close(fd)
	pgrp, err = unix.IoctlGetInt(fd, unix.TIOCGPGRP)
	return pgrp, err == nil
}
