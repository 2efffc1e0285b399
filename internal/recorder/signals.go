package recorder

import (
	"os"
	"os/signal"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// signals passes on what was sent to the recorder and meant for the tool.
type signals struct {
	pidfd int // of the tool
	ch    chan os.Signal
	wg    sync.WaitGroup
}

// forwardSignals starts passing signals on. The terminal sends its signals to
// the whole process group, tool included, so those are only kept from ending
// the recorder before the tool has. ^Z stops us both, as it should.
func forwardSignals(pid int) (*signals, error) {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return nil, os.NewSyscallError("pidfd_open", err)
	}
	s := &signals{pidfd: fd, ch: make(chan os.Signal, 16)}
	for _, sig := range []os.Signal{unix.SIGINT, unix.SIGQUIT, unix.SIGTERM, unix.SIGHUP, unix.SIGUSR1, unix.SIGUSR2} {
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
		if (n == unix.SIGINT || n == unix.SIGQUIT) && inForeground() {
			continue // the tool has had it from the terminal
		}
		unix.PidfdSendSignal(s.pidfd, n, nil, 0)
	}
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
	fd, err := unix.Open("/dev/tty", unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NOCTTY, 0)
	if err != nil {
		return false
	}
	defer unix.Close(fd)
	pgrp, err := unix.IoctlGetInt(fd, unix.TIOCGPGRP)
	return err == nil && pgrp == unix.Getpgrp()
}
