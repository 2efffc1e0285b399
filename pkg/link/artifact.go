package link

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
)

// match looks for the artifact among the subjects of links whose signature and
// statement were checked.
func (a *ArtifactResult) match(links []LinkResult) (string, error) {
	near := ""
	for _, l := range links {
		if l.Chain.Statement == nil {
			continue
		}
		for _, s := range l.Chain.Statement.Subjects {
			if sameDigest(a.Digest, s.Digest) {
				a.Matches = append(a.Matches, Match{Link: l.Name, Subject: s.Name})
			} else if len(a.Files) == 0 && baseName(s.Name) == baseName(a.Name) {
				near = fmt.Sprintf("; subject %q of %s has %s", s.Name, l.Name, digestString(s.Digest))
			}
		}
	}
	for _, l := range links {
		if len(a.Matches) > 0 || len(a.Files) == 0 || l.Chain.Statement == nil {
			continue
		}
		prefix, err := matchFiles(a.Files, l.Chain.Statement.Subjects)
		if err != nil {
			near += "; " + err.Error() + " by " + l.Name
			continue
		}
		a.Matches = append(a.Matches, Match{Link: l.Name, Subject: prefix, Files: len(a.Files)})
	}
	if len(a.Matches) == 0 {
		return "", fmt.Errorf("%s (%s) is not a subject of any link that verified%s", a.Name, a.content(), near)
	}
	return fmt.Sprintf("%s is subject %q of %s", a.Name, a.Matches[0].Subject, a.Matches[0].Link), nil
}

// sameDigest wants one algorithm in common, and no common one to differ.
func sameDigest(a, b map[string]string) bool {
	same := false
	for alg, v := range a {
		if w, ok := b[alg]; ok {
			if v != w {
				return false
			}
			// SHA-1 or MD5 alone would let an attacker choose the artifact.
			same = same || strongAlg(alg)
		}
	}
	return same
}

func strongAlg(alg string) bool {
	switch alg {
	case "sha256", "sha384", "sha512", DirHashAlg:
		return true
	}
	return false
}

// StrongDigest reports whether a set of digests, by algorithm, names one content:
// nobody can make another with the same.
func StrongDigest(digests map[string]string) bool {
	for alg := range digests {
		if strongAlg(alg) {
			return true
		}
	}
	return false
}

// matchFiles compares a directory with the subjects below one name, file by
// file: each must have its own content under its own name, none may be
// missing and none may be more.
func matchFiles(files map[string]string, subjects []Resource) (prefix string, err error) {
	byName := make(map[string]string, len(subjects))
	for _, s := range subjects {
		byName[s.Name] = s.Digest["sha256"]
	}
	names, listed := slices.Sorted(maps.Keys(files)), slices.Sorted(maps.Keys(byName))
	err, best := errors.New("its files are not listed"), 0
	for _, s := range subjects { // where could the first file be?
		prefix, ok := strings.CutSuffix(s.Name, names[0])
		if !ok || prefix != "" && !strings.HasSuffix(prefix, "/") {
			continue
		}
		same, differs := sameFiles(files, byName, names, listed, prefix)
		if differs == nil {
			return prefix, nil
		}
		if same >= best { // the likeliest place gives the reason
			err, best = differs, same
		}
	}
	return "", err
}

// sameFiles counts the files that are as listed, and says what differs. names and
// listed are the sorted keys of the two.
func sameFiles(files, subjects map[string]string, names, listed []string, prefix string) (same int, differs error) {
	for _, n := range names {
		switch want := subjects[prefix+n]; want {
		case files[n]:
			same++
		case "":
			differs = fmt.Errorf("its file %s is not listed", n)
		default:
			differs = fmt.Errorf("its file %s is listed with sha256:%s", n, want)
		}
	}
	for _, s := range listed {
		if n, ok := strings.CutPrefix(s, prefix); ok && files[n] == "" && differs == nil {
			differs = fmt.Errorf("file %s is missing, which is listed", n)
		}
	}
	return same, differs
}

// content is the digests, for people; of some directories there are too many.
func (a Artifact) content() string {
	if len(a.Digest) == 0 {
		return count(len(a.Files), "file")
	}
	return digestString(a.Digest)
}
