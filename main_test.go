package main

import (
	"bufio"
	"bytes"
	"cmp"
	"compress/gzip"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hmac"
	"crypto/md5"
	crand "crypto/rand"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/tls"
	"crypto/x509"
	"database/sql"
	"database/sql/driver"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"hash"
	"hash/crc32"
	"html"
	"io"
	"log/slog"
	"maps"
	"math/big"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
	"unsafe"

	"modernc.org/sqlite"
)

// ============================================================================
// Harness
//
// A server under test is a real listener over a real directory, in this process
// (newTestServer) or, where it is to be killed, as the program itself
// (startProgram): TestMain runs main when told so by the environment. Every
// directory is verified with plain SQL when its test ends.
// ============================================================================

const asProgram = "TEST_AS_BLOBNOM"

func TestMain(m *testing.M) {
	if os.Getenv(asProgram) != "" {
		main()
	}
	// Tests that run in parallel mostly wait.
	flag.Set("test.parallel", strconv.Itoa(2*runtime.GOMAXPROCS(0)))
	os.Exit(m.Run())
}

var (
	soak = flag.Int("soak", 3, "rounds of the crash test")
	seed = flag.Uint64("seed", 0, "seed of the model test; 0 takes a random one")
)

// testServer is a server under test and the directory of its script.
type testServer struct {
	t      testing.TB
	dir    string // of the files of a script
	clock  *clock
	client *http.Client // of do

	// While a server runs:
	store *store
	log   *syncBuffer
	base  string       // its URL up to the path
	stop  func() error // drains and closes; the error of both

	program *program          // see start
	kept    map[string]string // the files of a directory, see keep
	other   *sql.DB           // a connection of another process, see lock

	connections map[string]*connection // by name, see send
}

type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

func testConfig(t testing.TB, change ...func(*config)) *config {
	cfg := newConfig()
	cfg.DataDir = filepath.Join(t.TempDir(), "data")
	cfg.NumShards = 4
	cfg.BatchSize = 64
	cfg.Durability = "normal"
	for _, f := range change {
		f(cfg)
	}
	return cfg
}

func newTestServer(t testing.TB, change ...func(*config)) *testServer {
	t.Helper()
	return serveConfig(t, testConfig(t, change...))
}

func serveConfig(t testing.TB, cfg *config) *testServer {
	t.Helper()
	return serveAt(t, cfg, &clock{})
}

func serveAt(t testing.TB, cfg *config, now *clock) *testServer {
	t.Helper()
	ln, err := listen("127.0.0.1:0")
	fatal(t, err)
	s := &testServer{t: t, clock: now, client: client}
	fatal(t, s.serveOn(ln, cfg))
	return s
}

// serveOn serves on a listener, which the client reaches, until the test ends. Then the directory is
// verified, if it is still there.
func (s *testServer) serveOn(ln net.Listener, cfg *config) error {
	s.log = &syncBuffer{}
	var level slog.Level
	level.UnmarshalText([]byte(cfg.LogLevel))
	log := slog.New(slog.NewTextHandler(s.log, &slog.HandlerOptions{Level: level}))
	st, err := openStore(context.Background(), cfg, log, s.clock.now)
	if err != nil {
		return err
	}
	s.store = st
	s.base = "http://" + ln.Addr().String()
	if cfg.TLSCert != "" {
		s.base = "https://" + ln.Addr().String()
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- newServer(cfg, st, log).serve(ctx, ln) }()
	stop := sync.OnceValue(func() error {
		cancel()
		return errors.Join(<-served, st.close())
	})
	s.stop = stop
	dir := cfg.DataDir
	s.t.Cleanup(func() {
		s.client.CloseIdleConnections()
		err := stop()
		expect(s.t, err == nil, "stopping: %v", err)
		verifyDir(s.t, dir)
	})
	return nil
}

// clock is a store's time in the test's hands, in milliseconds. As 0 it is the real time.
type clock struct{ ms atomic.Int64 }

func (c *clock) now() time.Time {
	ms := c.ms.Load()
	if ms == 0 {
		return time.Now()
	}
	return time.UnixMilli(ms)
}

func (c *clock) advance(d time.Duration) { c.ms.Add(d.Milliseconds()) }

var client = newClient(new(net.Dialer).DialContext)

// newClient returns a client that follows no redirect and takes what is sent as it is.
func newClient(dial func(ctx context.Context, network, addr string) (net.Conn, error)) *http.Client {
	return &http.Client{
		Transport:     &http.Transport{DialContext: dial, MaxIdleConnsPerHost: 64, DisableCompression: true},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		Timeout:       30 * time.Second,
	}
}

// do sends one request; headers are name, value pairs. It returns the answer
// with its body read; a body that ends early is the returned error.
func (s *testServer) do(method, path string, body io.Reader, headers ...string) (*http.Response, []byte, error) {
	s.t.Helper()
	req, err := http.NewRequest(method, s.base+path, body)
	fatal(s.t, err)
	for i := 0; i < len(headers); i += 2 {
		req.Header.Add(headers[i], headers[i+1])
	}
	resp, err := s.client.Do(req)
	if err != nil {
		return nil, nil, err
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	return resp, data, err
}

// want sends one request and fails unless the answer has the status.
func (s *testServer) want(status int, method, path string, body []byte, headers ...string) (*http.Response, []byte) {
	s.t.Helper()
	resp, data, err := s.do(method, path, bytes.NewReader(body), headers...)
	fatal(s.t, err)
	if resp.StatusCode != status {
		s.t.Fatalf("%s %s %q: %d %q, want %d", method, path, headers, resp.StatusCode, data, status)
	}
	return resp, data
}

func (s *testServer) put(key string, body []byte, headers ...string) {
	s.t.Helper()
	status := http.StatusCreated
	if s.store != nil && s.store.async {
		status = http.StatusAccepted
	}
	s.want(status, "PUT", blobPath(key), body, headers...)
}

// wantBlob wants the blob to have this body, and the answer these headers: name, value pairs.
func (s *testServer) wantBlob(key string, body []byte, headers ...string) *http.Response {
	s.t.Helper()
	resp, got := s.want(http.StatusOK, "GET", blobPath(key), nil)
	if !bytes.Equal(got, body) {
		s.t.Fatalf("GET %q: %d bytes %.40q, want %d bytes %.40q", key, len(got), got, len(body), body)
	}
	for i := 0; i < len(headers); i += 2 {
		got := resp.Header.Get(headers[i])
		expect(s.t, got == headers[i+1], "GET %q: %s %q, want %q", key, headers[i], got, headers[i+1])
	}
	return resp
}

// blobPath percent-encodes every byte of key that is not plainly safe.
func blobPath(key string) string {
	const safe = "-0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
	urlPath := "/blob/"
	for _, c := range []byte(key) {
		if strings.IndexByte(safe, c) >= 0 {
			urlPath += string(c)
		} else {
			urlPath += fmt.Sprintf("%%%02X", c)
		}
	}
	return urlPath
}

// noise returns n bytes that differ for each seed.
func noise(n int, seed uint64) []byte {
	b := make([]byte, n)
	rand.NewChaCha8(sha256.Sum256([]byte(strconv.FormatUint(seed, 10)))).Read(b)
	return b
}

func fatal(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func expect(t testing.TB, ok bool, format string, args ...any) {
	t.Helper()
	if !ok {
		t.Errorf(format, args...)
	}
}

// skip skips a test that this machine cannot run. With CI=1 in the environment the test fails.
func skip(t testing.TB, format string, args ...any) {
	t.Helper()
	if os.Getenv("CI") == "1" {
		t.Fatalf(format, args...)
	}
	t.Skipf(format, args...)
}

// noErr panics on an error that would be a fault of the test.
func noErr[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// together calls f with 0 to n-1 at the same time, and waits.
func together(n int, f func(i int)) {
	var group sync.WaitGroup
	for i := range n {
		group.Go(func() { f(i) })
	}
	group.Wait()
}

// eventually waits until ok, a minute at most: the disk of a busy machine is slow.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(time.Minute)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatal("not within a minute: " + what)
		}
		time.Sleep(5 * time.Millisecond) // polling an outside effect, not synchronizing
	}
}

// verifyDir checks a directory at rest with SQL of its own: structure, placement, every content
// against its size and its sums, and that each chunk belongs to a blob or an orphan. It returns the
// SHA-256 of every blob, in hexadecimal.
func verifyDir(t testing.TB, dir string) map[string]string {
	t.Helper()
	sums := map[string]string{}
	files, _ := filepath.Glob(filepath.Join(dir, "shard_*.db"))
	for _, file := range files {
		db := openDB(file, "mode=ro")
		verifyShard(t, file, db, sums)
		db.Close()
	}
	return sums
}

// verifyShard checks one shard for verifyDir, and adds its blobs to sums.
func verifyShard(t testing.TB, file string, db *sql.DB, sums map[string]string) {
	t.Helper()
	const strayChunks = `SELECT count(*) FROM chunks
		WHERE id >> 20 NOT IN (SELECT id FROM blobs UNION SELECT id FROM orphans)`
	want := func(value, query string) {
		got := ""
		err := db.QueryRow(query).Scan(&got)
		expect(t, err == nil && got == value, "%s: %s: %q, %v", file, query, got, err)
	}
	want("ok", "PRAGMA integrity_check")
	want("0", strayChunks)
	var shards, index int64
	var hash string
	err := db.QueryRow(`SELECT
		(SELECT value FROM meta WHERE key = 'num_shards'),
		(SELECT value FROM meta WHERE key = 'shard'),
		(SELECT value FROM meta WHERE key = 'hash')`).Scan(&shards, &index, &hash)
	if err != nil {
		t.Errorf("%s: %v", file, err)
		return
	}
	rows, err := db.Query(`SELECT key, id, size, stored, codec, coalesce(crc32, -1), sha256, data
		FROM blobs`)
	fatal(t, err)
	defer rows.Close()
	for rows.Next() {
		var b verifiedBlob
		fatal(t, rows.Scan(&b.key, &b.id, &b.size, &b.stored, &b.codec, &b.crc, &b.sum, &b.data))
		home := int64(hashes[hash](b.key) % uint64(shards))
		expect(t, home == index, "key %q lies in shard %d, not %d", b.key, index, home)
		if b.size > chunkSize {
			b.data = slices.Concat(chunksOf(t, db, b.id)...)
		}
		b.verify(t)
		sums[b.key] = fmt.Sprintf("%x", b.sum)
	}
	fatal(t, rows.Err())
}

// verifiedBlob is a row of blobs, with its whole content.
type verifiedBlob struct {
	key              string
	id, size, stored int64
	codec, crc       int64
	sum, data        []byte
}

func (b *verifiedBlob) verify(t testing.TB) {
	t.Helper()
	length := int64(len(b.data))
	expect(t, length == b.stored, "key %q: %d bytes, recorded %d", b.key, length, b.stored)
	if b.codec == 1 {
		trailer := binary.LittleEndian.AppendUint32(nil, uint32(b.crc))
		trailer = binary.LittleEndian.AppendUint32(trailer, uint32(b.size))
		b.data = unzip(t, slices.Concat([]byte(gzipHeader), b.data, []byte(gzipEnd), trailer))
	}
	length = int64(len(b.data))
	expect(t, length == b.size, "key %q: a content of %d bytes, recorded %d", b.key, length, b.size)
	sum := sha256.Sum256(b.data)
	expect(t, bytes.Equal(sum[:], b.sum), "key %q: SHA-256 %x, recorded %x", b.key, sum, b.sum)
	crc := int64(crc32.ChecksumIEEE(b.data))
	expect(t, b.crc == -1 || b.crc == crc, "key %q: CRC-32 %x, recorded %x", b.key, crc, b.crc)
}

// unzip decodes exactly one gzip member.
func unzip(t testing.TB, member []byte) []byte {
	t.Helper()
	data, err := gunzip(member)
	expect(t, err == nil, "gzip member of %d bytes: %v", len(member), err)
	return data
}

func gunzip(member []byte) ([]byte, error) {
	in := bytes.NewReader(member)
	r, err := gzip.NewReader(in)
	if err != nil {
		return nil, err
	}
	r.Multistream(false)
	data, err := io.ReadAll(r)
	if err == nil && in.Len() > 0 {
		err = fmt.Errorf("%d bytes are behind it", in.Len())
	}
	return data, err
}

// prose returns n bytes that deflate well and differ for each seed.
func prose(n int, seed uint64) []byte {
	rnd := rand.New(rand.NewPCG(seed, 1))
	words := strings.Fields("a blob is a sequence of bytes under a key and nothing more than that; 0 1 2 3 4 5 6 7 8 9 {} <p>")
	b := make([]byte, 0, n+10)
	for len(b) < n {
		b = append(b, words[rnd.IntN(len(words))]...)
		b = append(b, ' ')
	}
	return b[:n]
}

func chunksOf(t testing.TB, db *sql.DB, id int64) (chunks [][]byte) {
	rows, err := db.Query("SELECT data FROM chunks WHERE id >> 20 = ? ORDER BY id", id)
	fatal(t, err)
	defer rows.Close()
	for rows.Next() {
		var c []byte
		fatal(t, rows.Scan(&c))
		chunks = append(chunks, c)
	}
	return chunks
}

// countRows adds up a query over all shards of a running or stopped server.
func countRows(t testing.TB, dir, query string) (sum int64) {
	t.Helper()
	files, _ := filepath.Glob(filepath.Join(dir, "shard_*.db"))
	for _, file := range files {
		db := openDB(file, "mode=ro&_pragma=busy_timeout(5000)")
		var n int64
		fatal(t, db.QueryRow(query).Scan(&n))
		db.Close()
		sum += n
	}
	return sum
}

// program is the real thing in a process of its own.
type program struct {
	*testServer
	cmd  *exec.Cmd
	done chan error
}

// asBlobnom lets the test binary that cmd runs be the program, on a free port.
func asBlobnom(t testing.TB, cmd *exec.Cmd, dir string, env ...string) *exec.Cmd {
	cmd.Dir = t.TempDir()
	own := []string{asProgram + "=1", "BLOBNOM_DATA_DIR=" + dir, "BLOBNOM_ADDR=127.0.0.1:0"}
	cmd.Env = slices.Concat(os.Environ(), own, env)
	return cmd
}

func startProgram(t testing.TB, dir string, env ...string) *program {
	t.Helper()
	return startBy(t, exec.Command(os.Args[0]), dir, env...)
}

// startBy starts the program by a command that becomes it.
func startBy(t testing.TB, cmd *exec.Cmd, dir string, env ...string) *program {
	t.Helper()
	p, err := tryStart(t, cmd, dir, env...)
	if p.base == "" {
		t.Fatalf("the program ended: %v\n%s", err, p.log)
	}
	return p
}

// tryStart starts the program by a command that becomes it. If the program ends instead of serving,
// it has no base, and the error says how it ended.
func tryStart(t testing.TB, cmd *exec.Cmd, dir string, env ...string) (*program, error) {
	t.Helper()
	p := &program{
		testServer: &testServer{t: t, log: &syncBuffer{}, client: client},
		cmd:        asBlobnom(t, cmd, dir, env...),
		done:       make(chan error, 1),
	}
	stderr := noErr(p.cmd.StderrPipe())
	fatal(t, p.cmd.Start())
	t.Cleanup(func() { p.cmd.Process.Kill() })
	listening := make(chan string, 1)
	go p.readLog(stderr, listening)
	select {
	case addr := <-listening:
		p.base = "http://" + addr
	case err := <-p.done:
		return p, err
	case <-time.After(30 * time.Second):
		t.Fatal("the program does not start")
	}
	return p, nil
}

// readLog reads the log until the program ends. It sends the address in it: one line has that.
func (p *program) readLog(stderr io.Reader, listening chan<- string) {
	lines := bufio.NewScanner(stderr)
	for lines.Scan() {
		fmt.Fprintln(p.log, lines.Text())
		_, rest, isListening := strings.Cut(lines.Text(), " listen=")
		if isListening {
			addr, _, _ := strings.Cut(rest, " ")
			listening <- addr
		}
	}
	p.done <- p.cmd.Wait()
}

// signal sends sig and waits for the end.
func (p *program) signal(sig os.Signal) error {
	p.t.Helper()
	fatal(p.t, p.cmd.Process.Signal(sig))
	select {
	case err := <-p.done:
		if err != nil {
			err = fmt.Errorf("%v: %w\n%s", sig, err, p.log)
		}
		return err
	case <-time.After(40 * time.Second):
		return errors.New("the program does not end")
	}
}

// page is the answer of a listing.
type page struct {
	Blobs    []listed
	Prefixes []string
	Next     *string
}

func (s *testServer) list(query url.Values) (p page) {
	s.t.Helper()
	resp, body := s.want(200, "GET", "/blob/?"+query.Encode(), nil)
	fatal(s.t, json.Unmarshal(body, &p))
	expect(s.t, resp.Header.Get("Content-Type") == "application/json", "%v", resp.Header)
	return p
}

func (s *testServer) listAll(prefix string, limit int) (keys []string) {
	s.t.Helper()
	for query := (url.Values{"prefix": {prefix}, "limit": {strconv.Itoa(limit)}}); ; {
		p := s.list(query)
		for _, row := range p.Blobs {
			keys = append(keys, row.Key)
		}
		if p.Next == nil {
			return keys
		}
		if len(p.Blobs) != limit || *p.Next != p.Blobs[limit-1].Key {
			s.t.Fatalf("a page of %d of %d has next %q", len(p.Blobs), limit, *p.Next)
		}
		query.Set("after", *p.Next)
	}
}

// A body of unknown length hides its type, so that the client chunks it.
func unknownLength(b []byte) io.Reader { return io.MultiReader(bytes.NewReader(b)) }

// snapshot maps every file in dir to its content's hash.
func snapshot(t testing.TB, dir string) map[string]string {
	t.Helper()
	files := map[string]string{}
	entries, err := os.ReadDir(dir)
	fatal(t, err)
	for _, e := range entries {
		data, err := os.ReadFile(filepath.Join(dir, e.Name()))
		fatal(t, err)
		files[e.Name()] = sumOf(data)
	}
	return files
}

// hold runs a query over a connection that stays open until the test ends, or db is closed.
func hold(t testing.TB, db *sql.DB, query string) *sql.DB {
	t.Helper()
	db.SetMaxOpenConns(1)
	t.Cleanup(func() { db.Close() })
	_, err := db.Exec(query)
	fatal(t, err)
	return db
}

func exec1(t testing.TB, path, query string) {
	t.Helper()
	hold(t, openDB(path, "_pragma=busy_timeout(5000)"), query).Close()
}

// mount makes a small file system, where the test may.
func mount(t testing.TB, size string) string {
	t.Helper()
	dir := t.TempDir()
	if out, err := exec.Command("mount", "-t", "tmpfs", "-o", "size="+size, "tmpfs", dir).CombinedOutput(); err != nil {
		skip(t, "cannot mount: %v %s", err, out)
	}
	t.Cleanup(func() {
		out, err := exec.Command("umount", "-l", dir).CombinedOutput()
		expect(t, err == nil, "umount: %v %s", err, out)
	})
	return dir
}

// runCommand runs one command line in this process; env is for its configuration.
func runCommand(t testing.TB, env []string, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	code = run(t.Context(), args, env, &out, &errs)
	return code, out.String(), errs.String()
}

// ============================================================================
// Scripts
//
// Most tests are scripts. A line is an action, and behind its arrow stands what
// the action has to answer. Two spaces or more separate the fields of a line.
//
//	# A blob lives as long as its ttl.
//	clock   2026-01-02T03:04:05.678Z
//	serve   num_shards=1
//	PUT     /blob/k?ttl=90s  Content-Type: text/plain  hello  -> 201  ETag: {tag hello}
//	clock   +90s
//	GET     /blob/k                       -> 404  ~not found  Blob-Expires: -
//	sql     data  SELECT count(*) FROM orphans               -> 0
//	blobnom check data  num_shards=4      -> 0  ~0 defects
//
// The answer of a request is a status, headers and a body, that of a command is
// its exit code and what it prints. A wanted field is one of
//
//	201                what the answer begins with: status, exit code, result
//	Name: value        a header; "Name: -" is an absent one. A command has "Stderr"
//	~text, !text       the text of the answer contains it, or does not
//	cut                the answer ends before its end; a text beside it need not be whole
//	"", anything else  the whole text, without the newline at its end
//
// An action without an arrow has to succeed. A line "wait ACTION -> ANSWER" tries
// again for a minute; if that is in vain the test ends. Braces hold what is made
// by the test: see brace. serve and stop run a server in this process; start,
// signal and kill the program in one of its own.
//
// Lines with send, take, answer and ends use a connection of their own, byte by
// byte. In a bubble the time of the server is fake, and sleep makes it pass.
// ============================================================================

// answer is what an action of a script answers.
type answer struct {
	status  string
	header  http.Header
	text    string
	isCut   bool
	isError bool
}

// scripts runs each paragraph of text as a test of its own, in a directory of its own: first the
// lines of setup, then the paragraph. Its first line is its name: "# name".
func scripts(t *testing.T, setup, text string) {
	for paragraph := range strings.SplitSeq(text, "\n\n") {
		name, lines, _ := strings.Cut(strings.TrimSpace(paragraph), "\n")
		t.Run(strings.TrimPrefix(name, "# "), func(t *testing.T) {
			script(t, setup+"\n"+lines)
		})
	}
}

// scriptRows runs a script once for each row of a table, as a test of its own. In the script $1, $2
// and so on stand for the fields of the row. The first of them is the name of the test.
func scriptRows(t *testing.T, text, table string) {
	for row := range strings.Lines(strings.TrimSpace(table)) {
		row = strings.TrimSpace(row)
		fields := fieldGap.Split(row, -1)
		lines := text
		for i, field := range fields {
			lines = strings.ReplaceAll(lines, fmt.Sprintf("$%d", i+1), field)
		}
		t.Run(fields[0], func(t *testing.T) { script(t, "# "+row+"\n"+lines) })
	}
}

// script runs the lines of text in a new directory, and returns what is left running.
func script(t testing.TB, text string) *testServer {
	t.Helper()
	s := &testServer{t: t, dir: t.TempDir(), client: client, clock: &clock{}}
	s.script(text)
	return s
}

// script runs more lines. A line that starts with "#" says what the lines behind it show.
func (s *testServer) script(text string) {
	s.t.Helper()
	about := ""
	for _, line := range strings.Split(text, "\n") { // in a range of Lines, Helper has no effect
		line = strings.TrimSpace(line)
		if strings.HasPrefix(line, "#") {
			about = line + "\n"
		} else if line != "" {
			s.scriptLine(about, line)
		}
	}
}

func (s *testServer) scriptLine(about, line string) {
	s.t.Helper()
	action, wanted, _ := strings.Cut(line, "->")
	action, isWait := strings.CutPrefix(action, "wait ")
	verb, fields, _ := strings.Cut(strings.TrimSpace(action), " ")
	try := func() string {
		return s.act(verb, splitFields(fields)).differs(splitFields(wanted))
	}
	problem := try()
	deadline := time.Now().Add(time.Minute)
	for isWait && problem != "" && time.Now().Before(deadline) {
		time.Sleep(5 * time.Millisecond) // polling an outside effect, not synchronizing
		problem = try()
	}
	if problem != "" {
		s.t.Errorf("%s%s\n\t%s", about, line, problem)
	}
	if problem != "" && isWait {
		s.t.FailNow() // others would wait as long
	}
}

var fieldGap = regexp.MustCompile(`  +`)

// splitFields returns the fields of a part of a line, with their braces expanded.
func splitFields(part string) []string {
	part = strings.TrimSpace(part)
	if part == "" {
		return nil
	}
	fields := fieldGap.Split(part, -1)
	for i, field := range fields {
		fields[i] = expand(field)
	}
	return fields
}

var headerField = regexp.MustCompile(`(?s)^([A-Z][A-Za-z0-9-]*):(?: (.*))?$`)

// differs returns how the answer differs from the wanted fields, "" if it does not.
func (a answer) differs(wanted []string) string {
	text := strings.TrimSuffix(a.text, "\n")
	got := fmt.Sprintf("it is %s %v %.300q", a.status, a.header, text)
	if len(wanted) == 0 {
		if a.isError {
			return got
		}
		return ""
	}
	if a.status != wanted[0] {
		return fmt.Sprintf("want %s, %s", wanted[0], got)
	}
	wantCut := slices.Contains(wanted, "cut")
	if a.isCut != wantCut {
		return fmt.Sprintf("want an answer that is cut off: %v, %s", wantCut, got)
	}
	for _, field := range wanted[1:] {
		header := headerField.FindStringSubmatch(field)
		isRight := false
		switch {
		case field == "cut":
			isRight = true
		case header != nil:
			isRight = cmp.Or(strings.Join(a.header.Values(header[1]), ", "), "-") == header[2]
		case strings.HasPrefix(field, "~"):
			isRight = strings.Contains(text, field[1:])
		case strings.HasPrefix(field, "!"):
			isRight = !strings.Contains(text, field[1:])
		default:
			whole := unquote(field)
			isRight = text == whole || wantCut && strings.HasPrefix(whole, text)
		}
		if !isRight {
			return fmt.Sprintf("want %.100q, %s", field, got)
		}
	}
	return ""
}

// unquote returns the text of a field: "" is the empty one.
func unquote(field string) string {
	if field == `""` {
		return ""
	}
	return field
}

var braceStart = regexp.MustCompile(`{[a-z][a-z0-9-]* `)

// expand replaces each {name argument} in text. Braces may be nested.
func expand(text string) string {
	start := braceStart.FindStringIndex(text)
	if start == nil {
		return text
	}
	name := text[start[0]+1 : start[1]-1]
	end := start[1]
	for depth := 1; depth > 0; end++ {
		switch text[end] {
		case '{':
			depth++
		case '}':
			depth--
		}
	}
	return text[:start[0]] + brace(name, expand(text[start[1]:end-1])) + expand(text[end:])
}

// brace returns the value of an expression in a script:
//
//	{noise 2C+5}  {prose 100 10:20}   bytes of a size, or some of them; C is the size of a chunk
//	{tag TEXT}  {gzip-tag TEXT}       the entity tags of a content
//	{sha-256 TEXT}  {base64 TEXT}     sums in base64; sha-512, md5, too
//	{sum TEXT}                        the SHA-256 in hexadecimal
//	{count 2C+5}                      a size as a number
//	{repeat 256 x}                    a text so many times
//	{sign sekret GET k 110}           the signature of a URL: method, key, expiry in Unix seconds
//	{shard KEY}  {home KEY}           the file of the key's shard, of four, and "shard 3: "
func brace(name, argument string) string {
	first, rest, _ := strings.Cut(argument, " ")
	switch name {
	case "noise":
		return slice(noise(byteCount(first), 1), rest)
	case "prose":
		return slice(prose(byteCount(first), 1), rest)
	case "tag":
		return tagOf([]byte(argument))
	case "gzip-tag":
		return `"` + sumOf([]byte(argument)) + `-gzip"`
	case "base64":
		return base64.StdEncoding.EncodeToString([]byte(argument))
	case "sum":
		return sumOf([]byte(argument))
	case "count":
		return strconv.Itoa(byteCount(argument))
	case "sign":
		return signature(argument)
	case "repeat":
		return strings.Repeat(rest, byteCount(first))
	case "shard":
		return filepath.Join("data", shardName(int(hashes["fnv1a"](argument)%4)))
	case "home":
		return fmt.Sprintf("shard %d: ", hashes["fnv1a"](argument)%4)
	}
	sums := map[string]hash.Hash{"sha-256": sha256.New(), "sha-512": sha512.New(), "md5": md5.New()}
	io.WriteString(sums[name], argument)
	return base64.StdEncoding.EncodeToString(sums[name].Sum(nil))
}

// byteCount adds up terms such as 100, 3C (three chunks) and -1.
func byteCount(text string) int {
	sum := 0
	for term := range strings.SplitSeq(strings.ReplaceAll(text, "-", "+-"), "+") {
		number, isChunks := strings.CutSuffix(term, "C")
		n := noErr(strconv.Atoi(cmp.Or(number, "1")))
		if isChunks {
			n *= chunkSize
		}
		sum += n
	}
	return sum
}

// slice returns the bytes FROM:TO of content; all of them if bounds is empty.
func slice(content []byte, bounds string) string {
	from, to, isPart := strings.Cut(bounds, ":")
	if isPart {
		content = content[byteCount(from):byteCount(to)]
	}
	return string(content)
}

// path returns the path of a file of the script.
func (s *testServer) path(name string) string {
	if filepath.IsAbs(name) {
		return name
	}
	return filepath.Join(s.dir, name)
}

// act does one action of a script.
func (s *testServer) act(verb string, fields []string) answer {
	s.t.Helper()
	if verb == strings.ToUpper(verb) {
		return s.request(verb, fields)
	}
	action := actions[verb]
	if action == nil {
		s.t.Fatalf("there is no action %q", verb)
	}
	return action(s, fields)
}

// request makes a request of a path, headers and a body, which is sent in chunks if a header says
// so. The text of an error is one line. A text that comes as gzip is unzipped.
func (s *testServer) request(method string, fields []string) answer {
	s.t.Helper()
	var headers []string
	body := ""
	for _, field := range fields[1:] {
		m := headerField.FindStringSubmatch(field)
		if m != nil {
			headers = append(headers, m[1], m[2])
		} else {
			body = unquote(field)
		}
	}
	var content io.Reader = strings.NewReader(body)
	if slices.Contains(headers, "chunked") {
		content = unknownLength([]byte(body))
	}
	resp, text, err := s.do(method, fields[0], content, headers...)
	if resp == nil {
		return answer{status: "none", text: err.Error(), isError: true}
	}
	if err == nil && method != "HEAD" && resp.Header.Get("Content-Encoding") == "gzip" {
		var badGzip error
		text, badGzip = gunzip(text)
		expect(s.t, badGzip == nil, "%s %.300q: the gzip: %v", method, fields, badGzip)
	}
	isError := resp.StatusCode >= 400
	if isError && method != "HEAD" && bytes.Count(text, []byte("\n")) != 1 {
		s.t.Errorf("%s %s: the text of %s is not one line: %.300q", method, fields[0], resp.Status, text)
	}
	return answer{
		status:  strconv.Itoa(resp.StatusCode),
		header:  resp.Header,
		text:    string(text),
		isCut:   err != nil,
		isError: isError || err != nil,
	}
}

// actions has what a script can do, besides requests.
var actions map[string]func(s *testServer, fields []string) answer

func init() {
	actions = map[string]func(s *testServer, fields []string) answer{
		"blobnom": (*testServer).command,
		"serve":   (*testServer).serve,
		"stop":    (*testServer).stopServer,
		"clock":   (*testServer).setClock,
		"log":     (*testServer).logged,
		"sql":     (*testServer).query,
		"write":   (*testServer).writeFile,
		"copy":    (*testServer).copyFiles,
		"remove":  (*testServer).removeFiles,
		"keep":    (*testServer).keep,
		"same":    (*testServer).same,
		"ls":      (*testServer).names,

		"overwrite": (*testServer).overwrite,

		"read": (*testServer).read,
		"fill": (*testServer).putAll,
		"list": (*testServer).listKeys,

		"trailer": (*testServer).putTrailer,
		"send":    (*testServer).send,
		"take":    (*testServer).take,
		"answer":  (*testServer).readAnswer,
		"ends":    (*testServer).readEnd,
		"trickle": (*testServer).trickle,
		"sleep":   (*testServer).sleep,
		"pause":   (*testServer).pause,
		"metric":  (*testServer).metric,
		"pair":    (*testServer).newPair,
		"trust":   (*testServer).trust,

		"start":     (*testServer).start,
		"signal":    (*testServer).sendSignal,
		"kill":      (*testServer).kill,
		"config":    (*testServer).loadConfig,
		"cgroup":    (*testServer).cgroup,
		"lock":      (*testServer).lock,
		"unlock":    (*testServer).unlock,
		"writer":    (*testServer).writer,
		"break":     (*testServer).breakWriter,
		"open":      (*testServer).open,
		"mount":     (*testServer).mountDisk,
		"fill-disk": (*testServer).fillDisk,

		"fail-read":    (*testServer).failRead,
		"packed":       (*testServer).packed,
		"compressible": (*testServer).compressible,
		"accepts":      (*testServer).accepts,

		"blobs": (*testServer).blobs,
		"alike": (*testServer).alike,
		"hold":  (*testServer).hold,
		"mode":  (*testServer).mode,
		"leaf":  (*testServer).copyLeaf,
	}
}

var (
	settingField  = regexp.MustCompile(`^([a-z_]+)=(.*)$`)
	variableField = regexp.MustCompile(`^[A-Z_]+[a-z_]*=`)
)

// environ returns the environment that settings and variables of a script make, and the other
// fields: "num_shards=2", "BLOBNOM_NUM_SHARDS=2". A setting that begins with "./" is a file of the
// script. Without a setting a directory has four shards in ./data.
func (s *testServer) environ(fields []string) (environ, rest []string) {
	values := map[string]string{
		"data_dir":   s.path("data"),
		"num_shards": "4",
		"batch_size": "64",
		"durability": "normal",
		"addr":       "127.0.0.1:0",
	}
	for _, field := range fields {
		m := settingField.FindStringSubmatch(field)
		switch {
		case variableField.MatchString(field):
			environ = append(environ, field)
		case m == nil:
			rest = append(rest, field)
		case strings.HasPrefix(m[2], "./"):
			values[m[1]] = s.path(m[2])
		default:
			values[m[1]] = m[2]
		}
	}
	for key, value := range values {
		environ = append(environ, "BLOBNOM_"+strings.ToUpper(key)+"="+value)
	}
	return environ, rest
}

// serve starts a server: "serve key=value  key=value". The answer "refused" has the error.
func (s *testServer) serve(fields []string) answer {
	s.t.Helper()
	environ, _ := s.environ(fields)
	cfg, _, err := loadConfig(os.DevNull, environ)
	fatal(s.t, err)
	cfg.DataDir = s.path(cfg.DataDir)
	ln, err := listen("127.0.0.1:0")
	fatal(s.t, err)
	err = s.serveOn(ln, cfg)
	if err != nil {
		ln.Close()
		isLine := !strings.Contains(err.Error(), "\n")
		expect(s.t, isLine, "serve %v: %q is not one line of an error", fields, err.Error())
		return answer{status: "refused", text: err.Error(), isError: true}
	}
	return answer{}
}

func (s *testServer) stopServer([]string) answer {
	s.t.Helper()
	if s.stop == nil {
		s.t.Fatal("no server runs")
	}
	fatal(s.t, s.stop())
	return answer{}
}

// setClock sets the clock of the server, "clock TIME", or moves it, "clock +90s".
func (s *testServer) setClock(fields []string) answer {
	s.t.Helper()
	if strings.Contains(fields[0], "T") {
		s.clock.ms.Store(noErr(time.Parse(time.RFC3339, fields[0])).UnixMilli())
	} else {
		s.clock.advance(noErr(time.ParseDuration(fields[0])))
	}
	return answer{}
}

// logged answers how many lines of the server's log contain a text: "log TEXT -> 1".
func (s *testServer) logged(fields []string) answer {
	text := s.log.String()
	count := 0
	for line := range strings.Lines(text) {
		if strings.Contains(line, fields[0]) {
			count++
		}
	}
	return answer{status: strconv.Itoa(count), text: text, isError: count == 0}
}

// query executes SQL: "sql FILE  TEXT". Its answer is the first value of the first row. In place of
// the file of a shard a directory means all its shards; their numbers are added up.
func (s *testServer) query(fields []string) answer {
	s.t.Helper()
	name := fields[0]
	text := fields[1]
	if !strings.HasSuffix(name, ".db") {
		return answer{status: fmt.Sprint(countRows(s.t, s.path(name), text))}
	}
	fatal(s.t, os.MkdirAll(filepath.Dir(s.path(name)), 0o700))
	db := openDB(s.path(name), "_pragma=busy_timeout(5000)")
	defer db.Close()
	var value sql.NullString
	err := db.QueryRow(text).Scan(&value)
	if err != nil && err != sql.ErrNoRows {
		s.t.Fatalf("%s: %v", text, err)
	}
	return answer{status: value.String}
}

// errorLine is what a command prints on the standard error when it fails, behind its log.
var errorLine = regexp.MustCompile(`^(time=.*\n)*blobnom: .*\n$`)

// command runs a command line of the program. It ends with a result on the standard output, or with
// an errorLine.
func (s *testServer) command(fields []string) answer {
	s.t.Helper()
	s.t.Chdir(s.dir)
	environ, args := s.environ(fields)
	var words []string
	for i, arg := range args {
		if i == 0 {
			words = strings.Fields(arg)
		} else {
			words = append(words, arg)
		}
	}
	ctx, cancel := context.WithTimeout(s.t.Context(), time.Minute)
	defer cancel()
	if len(words) == 0 || words[0] == "serve" {
		cancel() // a server that starts ends at once
	}
	var out, errs bytes.Buffer
	code := run(ctx, words, environ, &out, &errs)
	if code != 0 && !errorLine.MatchString(errs.String()) {
		s.t.Errorf("%v: %q is not one line of an error", words, errs.String())
	}
	return answer{
		status:  strconv.Itoa(code),
		header:  http.Header{"Stderr": {errs.String()}},
		text:    out.String() + errs.String(),
		isError: code != 0,
	}
}

// writeFile writes a file: "write NAME  TEXT".
func (s *testServer) writeFile(fields []string) answer {
	s.t.Helper()
	fatal(s.t, os.MkdirAll(filepath.Dir(s.path(fields[0])), 0o700))
	fatal(s.t, os.WriteFile(s.path(fields[0]), []byte(strings.Join(fields[1:], "\n")), 0o600))
	return answer{}
}

// copyFiles copies a file or a directory: "copy FROM  TO".
func (s *testServer) copyFiles(fields []string) answer {
	s.t.Helper()
	from := s.path(fields[0])
	to := s.path(fields[1])
	info, err := os.Stat(from)
	fatal(s.t, err)
	if info.IsDir() {
		fatal(s.t, os.CopyFS(to, os.DirFS(from)))
		return answer{}
	}
	data, err := os.ReadFile(from)
	fatal(s.t, err)
	fatal(s.t, os.WriteFile(to, data, 0o600))
	return answer{}
}

// removeFiles removes files and directories.
func (s *testServer) removeFiles(fields []string) answer {
	s.t.Helper()
	for _, name := range fields {
		fatal(s.t, os.RemoveAll(s.path(name)))
	}
	return answer{}
}

// overwrite writes bytes into a file: "overwrite FILE  OFFSET  BYTES".
func (s *testServer) overwrite(fields []string) answer {
	s.t.Helper()
	file, err := os.OpenFile(s.path(fields[0]), os.O_WRONLY, 0)
	fatal(s.t, err)
	_, err = file.WriteAt([]byte(fields[2]), int64(byteCount(fields[1])))
	fatal(s.t, errors.Join(err, file.Close()))
	return answer{}
}

// keep remembers the files of a directory.
func (s *testServer) keep(fields []string) answer {
	s.t.Helper()
	s.kept = snapshot(s.t, s.path(fields[0]))
	return answer{}
}

// same wants a directory to be as it was kept. A reader may have made -shm and empty -wal files.
func (s *testServer) same(fields []string) answer {
	s.t.Helper()
	isMade := func(name, sum string) bool {
		isEmptyWAL := strings.HasSuffix(name, "-wal") && s.kept[name] == "" && sum == sumOf(nil)
		return strings.HasSuffix(name, "-shm") || isEmptyWAL
	}
	before := maps.Clone(s.kept)
	after := snapshot(s.t, s.path(fields[0]))
	maps.DeleteFunc(before, isMade)
	maps.DeleteFunc(after, isMade)
	isSame := maps.Equal(before, after)
	return answer{text: fmt.Sprintf("%v became %v", before, after), isError: !isSame}
}

// names answers the names in a directory.
func (s *testServer) names(fields []string) answer {
	entries, _ := os.ReadDir(s.path(fields[0]))
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return answer{status: strconv.Itoa(len(names)), text: strings.Join(names, " ")}
}

// ============================================================================
// Commands
// ============================================================================

// start starts the program in a process of its own: "start  key=value". Where a line of shell is
// given, "blobnom" in it becomes the program: "start  ulimit -n 40; blobnom". A program that ends
// instead of serving answers as kill does.
func (s *testServer) start(fields []string) answer {
	s.t.Helper()
	environ, rest := s.environ(fields)
	line := strings.Join(append(rest, "blobnom")[:1], "")
	line = strings.ReplaceAll(line, "blobnom", `exec "$0"`)
	cmd := exec.Command("bash", "-c", line, os.Args[0])
	p, err := tryStart(s.t, cmd, s.path("data"), environ...)
	s.program = p
	s.log = p.log
	s.base = p.base
	if p.base != "" {
		return answer{}
	}
	return p.ended(err)
}

// ended answers how the program ended, and its log. The status is its exit code, or the signal that
// ended it: "signal: killed".
func (p *program) ended(err error) answer {
	status := "0"
	exit, isExit := errors.AsType[*exec.ExitError](err)
	if isExit {
		status = strings.TrimPrefix(exit.Error(), "exit status ")
	} else if err != nil {
		status = err.Error()
	}
	return answer{status: status, text: p.log.String(), isError: status != "0"}
}

var signals = map[string]syscall.Signal{
	"HUP":  syscall.SIGHUP,
	"INT":  syscall.SIGINT,
	"TERM": syscall.SIGTERM,
	"KILL": syscall.SIGKILL,
}

// sendSignal sends a signal to the program: "signal HUP".
func (s *testServer) sendSignal(fields []string) answer {
	s.t.Helper()
	fatal(s.t, s.program.cmd.Process.Signal(signals[fields[0]]))
	return answer{}
}

// kill sends a signal to the program, and waits for its end: "kill TERM -> 0  ~msg=stopped". A
// program that has stopped leaves no WAL.
func (s *testServer) kill(fields []string) answer {
	s.t.Helper()
	ended := s.program.ended(s.program.signal(signals[fields[0]]))
	left, _ := filepath.Glob(s.path("data/*-wal"))
	expect(s.t, ended.status != "0" || left == nil, "a stop leaves %q", left)
	verifyDir(s.t, s.path("data"))
	return ended
}

// Commands and flags that are not there, and wrong arguments, end with code 2 and one line.
func TestUsage(t *testing.T) {
	script(t, `
		# A question for help is answered on the standard output.
		blobnom -h              -> 0  Stderr: -  ~usage: blobnom [-config FILE] [COMMAND] [ARGUM
		blobnom help            -> 0  Stderr: -  ~check [DIR]  ~sign [-method M] [-ttl D] KEY
		blobnom sign -h         -> 0  Stderr: -  ~usage: blobnom [-config FILE] sign [-method M]
		blobnom sign -help      -> 0  ~-ttl D
		blobnom -h check        -> 0  ~check [DIR]  ~verify
		blobnom check -h x      -> 0  ~check [DIR]  ~verify
		blobnom help check      -> 0  ~check [DIR]  ~verify
		blobnom help sign       -> 0  ~-ttl D
		blobnom help help       -> 0  ~help [COMMAND]
		blobnom version         -> 0  Stderr: -  ~blobnom devel go1.
		blobnom --version       -> 0  Stderr: -  ~blobnom devel go1.
		blobnom --version sign  -> 0  ~blobnom devel go1.

		# A command or a flag that does not exist is refused.
		blobnom frobnicate       -> 2  blobnom: there is no command "frobnicate"; see: blobnom help
		blobnom frobnicate -h    -> 2  blobnom: there is no command "frobnicate"; see: blobnom help
		blobnom help frobnicate  -> 2  blobnom: there is no command "frobnicate"; see: blobnom help
		blobnom -frob            -> 2  ~not defined: -frob; see: blobnom help
		blobnom -conf x          -> 2  ~not defined: -conf
		blobnom -conf check      -> 2  ~not defined: -conf
		blobnom check -frob      -> 2  ~not defined: -frob
		blobnom check -ttl 1s    -> 2  ~not defined: -ttl

		# Arguments that a command does not take are refused.
		blobnom help check sign  -> 2  ~the arguments of help are: [COMMAND]; see: blobnom help
		blobnom version please   -> 2  ~the arguments of version are: none
		blobnom serve here       -> 2  ~the arguments of serve are: none
		blobnom check a b        -> 2  ~the arguments of check are: [DIR]
		blobnom backup           -> 2  ~the arguments of backup are: DIR
		blobnom migrate          -> 2  ~the arguments of migrate are: SRC
		blobnom sign             -> 2  ~the arguments of sign are: [-method M] [-ttl D] KEY
		blobnom sign a b         -> 2  ~the arguments of sign are: [-method M] [-ttl D] KEY

		# Values that a command does not take are refused.
		blobnom sign  `+"\xff"+`         -> 2  ~not valid UTF-8
		blobnom sign -method BREW k  -> 2  ~-method is one of GET, HEAD, PUT, POST, DELETE
		blobnom sign -ttl 0s k       -> 2  ~more than 0
		blobnom sign -ttl soon k     -> 2  ~"soon"
		blobnom sign k               -> 2  ~auth_token in built-in config.toml.example is empty
		blobnom -config              -> 2  ~flag needs an argument: -config
		blobnom -config none.toml    -> 2  ~blobnom: wrong configuration (none.toml): cannot read it

		# Nothing was created.
		ls .  -> 0
	`)
	_, example, _ := runCommand(t, nil, "help", "config")
	expect(t, example == exampleConfig, "help config does not print the example: %q", example)
}

func TestPortInUse(t *testing.T) {
	s := script(t, "serve")
	address := strings.TrimPrefix(s.base, "http://")
	s.script("blobnom serve  data_dir=other  addr=" + address + "  -> 1  ~cannot listen on addr ")
	s.script("ls .  -> 1  data")
}

// The log has the URL that a browser on this machine can open.
func TestURLOf(t *testing.T) {
	for _, row := range []struct{ ip, cert, want string }{
		{"::", "", "http://localhost:3000/"},
		{"::1", "", "http://[::1]:3000/"},
		{"10.0.0.1", "cert.pem", "https://10.0.0.1:3000/"},
	} {
		address := &net.TCPAddr{IP: net.ParseIP(row.ip), Port: 3000}
		got := urlOf(&config{TLSCert: row.cert}, address)
		expect(t, got == row.want, "%s: %s, want %s", row.ip, got, row.want)
	}
}

// A server warns at its start if it has no token and others can reach it.
func TestOpenServerWarning(t *testing.T) {
	script(t, `
		start   addr=0.0.0.0:0
		kill INT -> 0  ~url=http://localhost:  ~level=WARN msg="anyone who can reach this address

		start   addr=0.0.0.0:0  auth_token=a
		kill INT -> 0  ~url=http://localhost:  !level=WARN

		start   addr=127.0.0.1:0
		kill INT -> 0  ~url=http://127.0.0.1:  !level=WARN
	`)
}

// ============================================================================
// Configuration
// ============================================================================

// loadConfig loads a file with these lines, and variables: "config  LINE  BLOBNOM_NAME=value". The
// two required keys are in the file, too, unless a field mentions them. The headers of the answer
// are the fields of the configuration.
func (s *testServer) loadConfig(fields []string) answer {
	s.t.Helper()
	s.t.Chdir(s.dir)
	mentioned := strings.ToLower(strings.Join(fields, "\n"))
	text := ""
	if !strings.Contains(mentioned, "data_dir") {
		text += "data_dir = 'd'\n"
	}
	if !strings.Contains(mentioned, "num_shards") {
		text += "num_shards = 3\n"
	}
	var environ []string
	for _, field := range fields {
		if variableField.MatchString(field) {
			environ = append(environ, field)
		} else {
			text += field + "\n"
		}
	}
	fatal(s.t, os.WriteFile("c.toml", []byte(text), 0o600))
	cfg, _, err := loadConfig("c.toml", environ)
	if err != nil {
		problems := strings.TrimPrefix(err.Error(), "wrong configuration (c.toml): ")
		problems = strings.TrimSuffix(problems, "; see: blobnom help")
		return answer{status: "wrong", text: problems, isError: true}
	}
	header := http.Header{}
	for field, value := range reflect.ValueOf(*cfg).Fields() {
		header.Set(field.Name, fmt.Sprint(value))
	}
	return answer{status: "ok", header: header}
}

func TestConfigDefaults(t *testing.T) {
	script(t, `
		config -> ok  StorageCompression: false  OutputCompression: false  AsyncWrite: false
		config -> ok  BatchSize: 1  BatchTimeoutMS: 0  Addr: 0.0.0.0:3000  Durability: full
		config -> ok  Hash: fnv1a  MaxBlobBytes: 1073741824  MaxPendingBytes: 67108864
		config -> ok  AuthToken: -  ReadToken: -  PublicRead: false  CORSOrigin: -  CacheControl: -
		config -> ok  LogFormat: text  LogLevel: info
	`)
}

func TestConfigValues(t *testing.T) {
	script(t, `
		# A key takes its value from the file.
		config  data_dir = 'a b'              -> ok  DataDir: a b
		config  num_shards = 1000             -> ok  NumShards: 1000
		config  storage_compression = true    -> ok  StorageCompression: true
		config  output_compression = true     -> ok  OutputCompression: true
		config  async_write = true            -> ok  AsyncWrite: true
		config  batch_size = 2                -> ok  BatchSize: 2
		config  batch_timeout_ms = 5          -> ok  BatchTimeoutMS: 5
		config  addr = '[::1]:65535'          -> ok  Addr: [::1]:65535
		config  durability = 'normal'         -> ok  Durability: normal
		config  durability = 'off'            -> ok  Durability: off
		config  hash = 'crc32c'               -> ok  Hash: crc32c
		config  hash = 'sha256'               -> ok  Hash: sha256
		config  max_blob_bytes = 0            -> ok  MaxBlobBytes: 0
		config  max_pending_bytes = 1         -> ok  MaxPendingBytes: 1
		config  public_read = true            -> ok  PublicRead: true
		config  cors_origin = '*'             -> ok  CORSOrigin: *
		config  cors_origin = 'https://a:8'   -> ok  CORSOrigin: https://a:8
		config  cache_control = 'no-store'    -> ok  CacheControl: no-store
		config  log_format = 'json'           -> ok  LogFormat: json
		config  log_level = 'debug'           -> ok  LogLevel: debug
		config  log_level = 'warn'            -> ok  LogLevel: warn
		config  log_level = 'error'           -> ok  LogLevel: error

		# The environment takes precedence, whatever the file has. Of two values the first counts.
		config  BLOBNOM_DATA_DIR=c  BLOBNOM_NUM_SHARDS=0x10     -> ok  DataDir: c  NumShards: 16
		config  data_dir = 'a b'    BLOBNOM_DATA_DIR=c          -> ok  DataDir: c
		config  num_shards = 1000   BLOBNOM_NUM_SHARDS=1        -> ok  NumShards: 1
		config  async_write = true  BLOBNOM_ASYNC_WRITE=false   -> ok  AsyncWrite: false
		config  hash = 'md5'        BLOBNOM_HASH=crc32c         -> ok  Hash: crc32c
		config  BLOBNOM_HASH=crc32c  BLOBNOM_HASH=md5           -> ok  Hash: crc32c
		config  num_shards = 7      BLOBNOM_num_shards=x        -> ok  NumShards: 7
		config  num_shards = 7      XBLOBNOM_NUM_SHARDS=x       -> ok  NumShards: 7
	`)
}

func TestWrongValues(t *testing.T) {
	script(t, `
		# A wrong value is refused with its key, the value and what it must be.
		config  num_shards = 0    -> wrong  num_shards = 0: must be a number from 1 to 1000
		config  num_shards = '4'  -> wrong  num_shards = "4": must be a whole number
		config  num_shards = 4.0  -> wrong  num_shards = 4: must be a whole number
		config  data_dir = 1      -> wrong  data_dir = 1: must be text in quotes
		config  public_read = 1   -> wrong  public_read = 1: must be true or false

		config  data_dir = ''                    -> wrong  ~must be the name of a directory
		config  data_dir = "a\u0000"             -> wrong  ~must be the name of a directory
		config  num_shards = 1001                -> wrong  ~must be a number from 1 to 1000
		config  storage_compression = 1          -> wrong  ~must be true or false
		config  output_compression = 'true'      -> wrong  ~must be true or false
		config  async_write = 'yes'              -> wrong  ~must be true or false
		config  batch_size = 0                   -> wrong  ~must be a number, 1 or more
		config  batch_timeout_ms = -1            -> wrong  ~must be a number, 0 or more
		config  addr = 'here'                    -> wrong  ~must be HOST:PORT, such as "127.0.0.1:
		config  addr = ':http'                   -> wrong  ~must be HOST:PORT
		config  addr = ':65536'                  -> wrong  ~must be HOST:PORT
		config  durability = 'most'              -> wrong  ~must be one of full, normal, off
		config  hash = 'md5'                     -> wrong  ~must be one of fnv1a, crc32c, sha256
		config  max_blob_bytes = -1              -> wrong  ~must be a number, 0 or more
		config  max_blob_bytes = '1G'            -> wrong  ~must be a whole number
		config  max_pending_bytes = 0            -> wrong  ~must be a number, 1 or more
		config  tls_cert = 'a'                   -> wrong  ~tls_key = "": must be set together with
		config  tls_key = 'b'                    -> wrong  ~tls_key = "b": must be set together with
		config  tls_cert = 'a'  tls_key = 'b'    -> wrong  ~be its key: open a: no such file
		config  cors_origin = 'a.org'            -> wrong  ~must be an origin
		config  cors_origin = 'https://a.org/'   -> wrong  ~must be an origin
		config  cache_control = "a\nb"           -> wrong  ~must be visible ASCII
		config  log_format = ''                  -> wrong  ~must be one of text, json
		config  log_level = 'loud'               -> wrong  ~must be one of debug, info, warn, error

		# A key that does not exist is refused. Its value may be a secret.
		config  auth_tokens = 'secret'           -> wrong  auth_tokens: unknown key
		config  AUTH_TOKEN = 'secret'            -> wrong  AUTH_TOKEN: unknown key
		config  [table]  auth_token = 'secret'   -> wrong  table: unknown key

		# So is a wrong variable. An empty one must not open the server.
		config  BLOBNOM_NUM_SHARDS=0             -> wrong  ~BLOBNOM_NUM_SHARDS = 0: must be a number
		config  BLOBNOM_BATCH_SIZE=many          -> wrong  ~BLOBNOM_BATCH_SIZE = "many": must be a
		config  BLOBNOM_ASYNC_WRITE=yes          -> wrong  ~must be true or false
		config  BLOBNOM_DATA_DIR=                -> wrong  ~must be the name of a directory
		config  BLOBNOM_AUTH_TOKEN=              -> wrong  ~BLOBNOM_AUTH_TOKEN: is set but empty;
		config  BLOBNOM_AUTH_TOKEN_FILE=         -> wrong  ~is set but empty; give it a value or
		config  BLOBNOM_READ_TOKEN=              -> wrong  ~is set but empty
		config  BLOBNOM_READ_TOKEN_FILE=         -> wrong  ~is set but empty
		config  auth_token = 'a'  BLOBNOM_AUTH_TOKEN=  -> wrong  ~is set but empty
	`)
}

// All problems are told together, on one line, before anything is created.
func TestConfigReport(t *testing.T) {
	script(t, `
		config  # no num_shards  -> wrong  num_shards: is required and missing
		config  # no data_dir    -> wrong  data_dir: is required and missing
		config  foo = 2  hash = 1  [bar]  -> wrong  hash = 1: must be text in quotes; bar: unknown key; foo: unknown key

		# The text of the file is not shown where it cannot be parsed: it may be a secret.
		config  auth_token = secret  -> wrong  ~not valid TOML: line 3 cannot be parsed, after the key "auth_token":  !secret
		config  foo =  BLOBNOM_HASH=md5  -> wrong  ~or a number that is too large?; BLOBNOM_HASH = "md5":

		# Without -config the file is config.toml.
		write  c.toml       hash = 1
		write  config.toml  hash = 2
		blobnom serve           -> 2  ~blobnom: wrong configuration (config.toml): hash = 2: must be
		blobnom -config c.toml  -> 2  ~blobnom: wrong configuration (c.toml): hash = 1: must be text
		ls .  -> 2  c.toml config.toml
	`)
}

// A token is given directly or in a file.
func TestConfigTokens(t *testing.T) {
	s := script(t, `
		write  other  other
		write  words  two words
		write  empty
	`)
	fatal(t, os.WriteFile(s.path("token"), []byte(" \tfrom-file\r\n"), 0o600))
	s.script(`
		config  auth_token = 'a'                   -> ok  AuthToken: a  ReadToken: -
		config  auth_token = ''                    -> ok  AuthToken: -
		config  auth_token_file = 'token'          -> ok  AuthToken: from-file  ReadToken: -
		config  BLOBNOM_AUTH_TOKEN_FILE=token      -> ok  AuthToken: from-file  ReadToken: -
		config  auth_token = 'a'  read_token = 'r' -> ok  AuthToken: a  ReadToken: r
		config  auth_token = 'a'  read_token_file = 'other'             -> ok  ReadToken: other
		config  auth_token_file = 'token'  read_token_file = 'other'    -> ok  ReadToken: other
		config  auth_token = 'a'  read_token = 'r'  BLOBNOM_READ_TOKEN=e  -> ok  ReadToken: e

		# A token that is given twice is refused.
		config  auth_token = 'a'  auth_token_file = 'b'     -> wrong  ~auth_token and auth_token_file are
		config  auth_token = 'a'  BLOBNOM_AUTH_TOKEN_FILE=b -> wrong  ~auth_token and auth_token_file are
		config  auth_token_file = 'b'  BLOBNOM_AUTH_TOKEN=a -> wrong  ~auth_token and auth_token_file are
		config  read_token = 'a'  read_token_file = 'b'     -> wrong  ~are both given; keep one

		# A file without a token is refused.
		config  auth_token_file = 'none'        -> wrong  ~auth_token_file = "none": must be a file with
		config  auth_token_file = 'none'        -> wrong  ~a token: open none: no such file
		config  auth_token_file = '.'           -> wrong  ~a token: read .: is a directory
		config  auth_token_file = 'empty'       -> wrong  ~a token: it is empty
		config  auth_token_file = 'words'       -> wrong  ~a token: it is empty, or not visible ASCII
		config  auth_token = 'a'  read_token_file = 'empty'   -> wrong  ~read_token_file = "empty": must
		config  auth_token_file = 'none'  read_token = 'r'    -> wrong  ~no such file  !needs

		# A wrong token is not shown.
		config  auth_token = 'a secret'         -> wrong  ~ = "(secret)": must be visible  !a secret
		config  auth_token = 'secrét'           -> wrong  ~ = "(secret)": must be visible  !secrét
		config  auth_token = 123456             -> wrong  ~ = "(secret)": must be text in  !123456
		config  BLOBNOM_AUTH_TOKEN=a secret     -> wrong  ~ = "(secret)": must be visible  !a secret
		config  auth_token = 'a'  read_token = 'a b'  -> wrong  ~read_token = "(secret)": must be visible

		# A read token needs another auth_token.
		config  read_token = 'r'                -> wrong  ~read_token: needs auth_token; without that
		config  read_token_file = 'other'       -> wrong  ~read_token: needs auth_token
		config  auth_token = 'a'  read_token = 'a'               -> wrong  ~must differ from auth_token
		config  auth_token = 'other'  read_token_file = 'other'  -> wrong  ~must differ from auth_token
	`)
}

// A variable that names no key is warned about, without its value, in the log's format and level.
func TestConfigWarning(t *testing.T) {
	scripts(t, "", `
		# level and name
		blobnom sign k  auth_token=a  no_such_key=xyz  -> 0  ~WARN  ~BLOBNOM_NO_SUCH_KEY  !xyz

		# small letters
		blobnom sign k  auth_token=a  BLOBNOM_log_level=info  -> 0  ~variable=BLOBNOM_log_level

		# JSON
		blobnom sign k  auth_token=a  x=y  log_format=json  -> 0  ~"level":"WARN"  ~:"BLOBNOM_X"

		# a level without warnings
		blobnom sign k  auth_token=a  x=y  log_level=error  -> 0  Stderr: -

		# a variable of something else
		blobnom sign k  auth_token=a  XBLOBNOM_X=y  -> 0  Stderr: -
	`)
}

// The lines of the example that are commented out show the defaults, in the order of the table.
func TestExampleConfig(t *testing.T) {
	t.Chdir(t.TempDir())
	builtIn, _, err := loadConfig("", nil)
	fatal(t, err)
	var keys []string
	for _, row := range builtIn.settings() {
		keys = append(keys, row.key)
	}
	commented := regexp.MustCompile(`(?m)^# ([a-z_]+ = )`)
	text := commented.ReplaceAllString(exampleConfig, "$1")
	shownKeys := regexp.MustCompile(`(?m)^[a-z_]+\b`).FindAllString(text, -1)
	expect(t, slices.Equal(shownKeys, keys), "the example shows %q, want %q", shownKeys, keys)
	fatal(t, os.WriteFile("config.toml", []byte(text), 0o600))
	shown, _, err := loadConfig("", nil)
	fatal(t, err)
	expect(t, *shown == *builtIn, "the example shows %+v, want %+v", shown, builtIn)
}

// cgroup answers the limit of the memory by the files of the script.
func (s *testServer) cgroup([]string) answer {
	limit := cgroupLimit(s.dir)
	if limit == noLimit {
		return answer{status: "none"}
	}
	return answer{status: fmt.Sprint(limit)}
}

// Control groups of both versions limit the memory. The least limit of the group and its parents
// counts.
func TestCgroupLimit(t *testing.T) {
	scripts(t, "cgroup -> none", `
		# version 2
		write   proc/self/cgroup  0::/a.slice/b
		write   sys/fs/cgroup/a.slice/b/memory.max  max
		cgroup  -> none
		write   sys/fs/cgroup/a.slice/memory.max    7
		cgroup  -> 7
		write   sys/fs/cgroup/a.slice/b/memory.max  5
		cgroup  -> 5

		# version 2 in a container
		write   proc/self/cgroup          0::/
		write   sys/fs/cgroup/memory.max  9
		cgroup  -> 9

		# version 1
		write   proc/self/cgroup  3:cpu:/x  4:memory:/b
		write   sys/fs/cgroup/memory/memory.limit_in_bytes    9223372036854771712
		cgroup  -> none
		write   sys/fs/cgroup/memory/x/memory.limit_in_bytes  2000
		cgroup  -> none
		write   sys/fs/cgroup/memory/b/memory.limit_in_bytes  3000
		cgroup  -> 3000

		# version 1 in a container, where the path is the host's
		write   proc/self/cgroup  4:memory:/docker/x
		write   sys/fs/cgroup/memory/memory.limit_in_bytes    8
		cgroup  -> 8

		# both versions
		write   proc/self/cgroup  4:memory:/b  0::/
		write   sys/fs/cgroup/memory/b/memory.limit_in_bytes  6
		cgroup  -> 6
	`)
}

func FuzzConfig(f *testing.F) {
	f.Add(exampleConfig, "true")
	f.Add("num_shards = 1979-05-27", "")
	f.Fuzz(func(t *testing.T, text, isAsync string) {
		file := filepath.Join(t.TempDir(), "c.toml")
		fatal(t, os.WriteFile(file, []byte(text), 0o600))
		cfg, _, err := loadConfig(file, []string{"BLOBNOM_ASYNC_WRITE=" + isAsync})
		if err != nil {
			return
		}
		_, err = strconv.ParseBool(isAsync)
		expect(t, err == nil, "async_write: %q is accepted", isAsync)
		shards := cfg.NumShards
		expect(t, between(1, maxShards)(shards) == "", "%d shards are accepted", shards)
		expect(t, cfg.DataDir != "", "no data_dir is accepted")
	})
}

// ============================================================================
// HTTP server, Handlers
// ============================================================================

func sumOf(content []byte) string { return fmt.Sprintf("%x", sha256.Sum256(content)) }
func tagOf(content []byte) string { return `"` + sumOf(content) + `"` }

// read makes a GET and a HEAD, which must have the same status and headers: "read PATH".
func (s *testServer) read(fields []string) answer {
	s.t.Helper()
	get := s.request("GET", fields)
	head := s.request("HEAD", fields)
	delete(get.header, "Date")
	delete(head.header, "Date")
	want := fmt.Sprintln(get.status, get.header)
	got := fmt.Sprintln(head.status, head.header)
	expect(s.t, got == want, "HEAD %s: %swant %s", fields, got, want)
	return get
}

// putAll stores each key with itself as its content: "fill KEY  KEY".
func (s *testServer) putAll(keys []string) answer {
	s.t.Helper()
	for _, key := range keys {
		s.put(key, []byte(key))
	}
	return answer{}
}

// listKeys lists: "list QUERY -> COUNT  KEYS". Keys are quoted as in a Go string. Behind them stand
// the folders in brackets, and "next KEY" before a next page. Without a limit in QUERY it asks for
// pages of several limits, too, which must have the same keys.
func (s *testServer) listKeys(fields []string) answer {
	s.t.Helper()
	query, err := url.ParseQuery(strings.Join(fields, ""))
	fatal(s.t, err)
	p := s.list(query)
	words := keysOf(p)
	for _, folder := range p.Prefixes {
		words = append(words, "["+folder+"]")
	}
	count := len(words)
	if p.Next != nil {
		words = append(words, "next", *p.Next)
	}
	if !query.Has("limit") {
		s.wantPages(query, append(keysOf(p), p.Prefixes...))
	}
	text := strconv.Quote(strings.Join(words, " "))
	text = text[1 : len(text)-1]
	return answer{status: strconv.Itoa(count), text: text}
}

func keysOf(p page) (keys []string) {
	for _, row := range p.Blobs {
		keys = append(keys, row.Key)
	}
	return keys
}

// wantPages wants the pages of a listing, whatever their limit, to have these keys and folders.
func (s *testServer) wantPages(query url.Values, want []string) {
	s.t.Helper()
	slices.Sort(want)
	for _, limit := range []int{1, 3, 1000} {
		page := maps.Clone(query)
		page.Set("limit", strconv.Itoa(limit))
		for rest := want; ; rest = rest[limit:] {
			p := s.list(page)
			got := append(keysOf(p), p.Prefixes...)
			slices.Sort(got)
			first := rest[:min(limit, len(rest))]
			isLast := len(rest) <= limit
			if !slices.Equal(got, first) || isLast != (p.Next == nil) {
				s.t.Errorf("%v: %q, last: %v, want %q of %q", page, got, p.Next == nil, first, rest)
				return
			}
			if isLast {
				break
			}
			page.Set("after", *p.Next)
		}
	}
}

// table returns the fields of each line of text.
func table(text string) (rows [][]string) {
	for line := range strings.Lines(strings.TrimSpace(text)) {
		rows = append(rows, splitFields(line))
	}
	return rows
}

// A key is what stands behind /blob/, percent-decoded. Only dot segments that are not encoded are
// resolved. The first path of a row is fully encoded, the others are spellings of the same key.
func TestKeys(t *testing.T) {
	s := script(t, "serve")
	for _, row := range table(`
		a        /blob/a  /blob/x/../a  /blob/./a  /blob/%2E%2E/../a  /x/../blob/a  /blob//../a
		a/b.jpg  /blob/a%2Fb%2Ejpg  /blob/a/b.jpg  /blob/a%2Fb.jp%67
		a//b     /blob/a%2F%2Fb  /blob/a//b  /blob/a%2f/b  /blob/a/./%2Fb  /blob/a//x/../b
		/        /blob/%2F
		//       /blob/%2F%2F  /blob///  /blob/%2F/  /blob///.  /blob///x/..
		dir/     /blob/dir%2F  /blob/dir/  /blob/dir/.  /blob/dir/x/..  /blob/dir/./
		..       /blob/%2E%2E  /blob/./%2E%2E  /blob/x/../%2E%2E
		../x     /blob/%2E%2E%2Fx  /blob/%2E%2E/x  /blob/%2e./x  /blob/y/../%2E%2E/x
		a/..//b  /blob/a%2F%2E%2E%2F%2Fb  /blob/a/%2E%2E//b  /blob/a/%2e%2e/%2Fb
		a +&=?%2F    /blob/a%20%2B%26%3D%3F%252F  /blob/a%20+&=%3F%252F
		ä日'\x01\x7f  /blob/%C3%A4%E6%97%A5%27%01%7F  /blob/ä日'%01%7F
		{repeat 1024 k}  /blob/{repeat 1024 k}
	`) {
		for _, path := range row[1:] {
			names := strings.NewReplacer("KEY", row[0], "FIRST", row[1], "PATH", path)
			s.script(names.Replace(`
				PUT     PATH   PATH  -> 201  Location: -
				GET     FIRST  -> 200  PATH
				list    -> 1   KEY
				DELETE  PATH   -> 204
			`))
		}
	}
	// A raw quote, which a client should have escaped, leaves %2F as it is.
	s.put(`ü//"`, nil)
	conn := s.dial("GET /blob/ü%2F%2F\" HTTP/1.1\r\nHost: x\r\n\r\n" +
		"GET http://x HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
	got, err := io.ReadAll(conn)
	expect(t, strings.Count(string(got), " 200 OK\r\n") == 2, "%s %v", got, err)
}

// Requests of other paths, and of other methods, are refused.
func TestRefusedPaths(t *testing.T) {
	s := script(t, "serve\nfill a")
	for _, method := range []string{"GET", "PUT", "DELETE"} {
		s.script(strings.ReplaceAll(`
			METHOD  /blob/..               -> 400  ~percent-encode a ".." of the key
			METHOD  /blob/a/../../x        -> 400
			METHOD  /blob/%2E%2E/../..     -> 400
			METHOD  /blob/%00              -> 400  ~the key is not valid UTF-8, or has a NUL byte
			METHOD  /blob/%ff              -> 400
			METHOD  /blob/{repeat 1025 k}  -> 400  ~the key has 1025 bytes
			METHOD  /blobs/a               -> 404  not found: blobs are at /blob/KEY
			METHOD  /x/./y                 -> 404
			METHOD  //blob/a               -> 404
			METHOD  /healthz/              -> 404
		`, "METHOD", method))
	}
	s.script(`
		# These are other keys than a.
		GET     /blob/a.         -> 404
		GET     /blob/a/         -> 404
		GET     /blob/a/%2e%2e/  -> 404
		PUT     /blob/           -> 400  ~the key has 0 bytes
		DELETE  /blob/x/..       -> 400
		PATCH   /blob/a          -> 405  Allow: GET, HEAD, PUT, POST, DELETE
		POST    /                -> 405  Allow: GET, HEAD
		GET     /blob/a          -> 200  a
	`)
}

func FuzzKeys(f *testing.F) {
	s := newTestServer(f)
	for _, key := range []string{"a", "a//b", "..", "%", "\x00", "\xff", ""} {
		f.Add(key)
	}
	f.Fuzz(func(t *testing.T, key string) {
		s.t = t
		resp, text, err := s.do("PUT", blobPath(key), strings.NewReader(key))
		fatal(t, err)
		if checkKey(key) == nil {
			s.wantBlob(key, []byte(key))
		} else {
			expect(t, resp.StatusCode/100 == 4, "%q: %s %s", key, resp.Status, text)
		}
	})
}

// A read describes the blob, whatever its size.
func TestHeaders(t *testing.T) {
	for _, size := range []string{"0", "5", "C", "C+5"} {
		script(t, strings.NewReplacer("SIZE", size, "BYTE", "\xff").Replace(`
			clock   2026-01-02T03:04:05.678Z
			serve
			POST    /blob/k  Content-Type: a/b  {noise SIZE}  -> 201  ETag: {tag {noise SIZE}}
			read    /blob/k  -> 200  {noise SIZE}  Content-Length: {count SIZE}  Content-Type: a/b
			read    /blob/k  -> 200  ETag: {tag {noise SIZE}}  Accept-Ranges: bytes
			read    /blob/k  -> 200  Repr-Digest: sha-256=:{sha-256 {noise SIZE}}:
			read    /blob/k  -> 200  Last-Modified: Fri, 02 Jan 2026 03:04:05 GMT  Blob-Version: 0
			read    /blob/k  -> 200  Blob-Created: 2026-01-02T03:04:05.678Z  Blob-Expires: -
			read    /blob/k  -> 200  Blob-Updated: 2026-01-02T03:04:05.678Z
			# No script of a stored page runs.
			read    /blob/k  -> 200  X-Content-Type-Options: nosniff
			read    /blob/k  -> 200  Content-Security-Policy: sandbox allow-same-origin allow-downloads allow-popups
			# A replaced blob has the next version, and its own type.
			clock   +1ms
			PUT     /blob/k  new  -> 201
			read    /blob/k  -> 200  new  Content-Type: application/octet-stream  Blob-Version: 1
			read    /blob/k  -> 200  Blob-Created: 2026-01-02T03:04:05.678Z
			read    /blob/k  -> 200  Blob-Updated: 2026-01-02T03:04:05.679Z
			# A deleted blob begins anew. DELETE does not tell whether there was one.
			DELETE  /blob/k  -> 204
			DELETE  /blob/k  -> 204
			read    /blob/k  -> 404  Blob-Version: -
			PUT     /blob/k  {noise SIZE}  -> 201
			read    /blob/k  -> 200  Blob-Created: 2026-01-02T03:04:05.679Z  Blob-Version: 0
			# A write that a read could not give back is refused.
			PUT     /blob/k  Content-Encoding: gzip        x  -> 400
			PUT     /blob/k  Content-Encoding:  Content-Encoding: gzip  x  -> 400
			PUT     /blob/k  Content-Range: bytes 0-1/2    x  -> 400
			PUT     /blob/k  Content-Type: {repeat 256 x}  x  -> 400  ~longer than 255 bytes
			PUT     /blob/k  Content-Type: a/BYTE           x  -> 400  ~or not UTF-8
			read    /blob/k  -> 200  {noise SIZE}  Blob-Version: 0
		`))
	}
}

func TestRanges(t *testing.T) {
	for _, size := range []string{"1000", "2C+1000"} {
		blob := "{noise " + size + "}"
		length := "{count " + size + "}"
		tag := "{tag " + blob + "}"
		names := []string{"SIZE", size, "LENGTH", length, "BLOB", blob, "TAG", tag}
		script(t, strings.NewReplacer(names...).Replace(`
			clock  2026-01-02T03:04:05.678Z
			serve
			PUT   /blob/k  BLOB
			read  /blob/k  Range: bytes=10-19              -> 206  {noise SIZE 10:20}  ETag: TAG
			read  /blob/k  Range: bytes=10-19              -> 206  Content-Range: bytes 10-19/LENGTH
			read  /blob/k  Range: bytes=-7                 -> 206  {noise SIZE SIZE-7:SIZE}
			read  /blob/k  Range: bytes={count SIZE-1}-    -> 206  {noise SIZE SIZE-1:SIZE}
			read  /blob/k  Range: bytes=990-LENGTH         -> 206  {noise SIZE 990:SIZE}
			read  /blob/k  Range: bytes=0-9  If-Range: TAG -> 206  {noise SIZE 0:10}
			# A range without a byte of the blob is refused.
			read  /blob/k  Range: bytes=LENGTH-            -> 416  Content-Range: bytes */LENGTH
			read  /blob/k  Range: bytes=-0                 -> 416  Content-Range: bytes */LENGTH
			read  /blob/k  Range: bytes=9-1                -> 416  Content-Range: bytes */LENGTH
			read  /blob/k  Range: bytes=-0  If-Range: TAG  -> 416  ETag: -
			# The whole answers several ranges, other units, and a range of another content.
			read  /blob/k  Range: bytes=1-2,500-600,0-3         -> 200  BLOB  Content-Range: -
			read  /blob/k  Range: lines=1-2                     -> 200  BLOB
			read  /blob/k  Range: bytes=0-9  If-Range: "other"  -> 200  BLOB
			read  /blob/k  Range: bytes=-0  If-Range: "other"   -> 200  BLOB
			read  /blob/k  Range: bytes=0-9  If-Range: W/TAG    -> 200  BLOB
			# Two contents may have one date.
			read  /blob/k  Range: bytes=0-9  If-Range: Fri, 02 Jan 2026 03:04:05 GMT  -> 200  BLOB
			# Conditions come first.
			read  /blob/k  Range: bytes=0-0  If-None-Match: TAG -> 304  ""
			read  /blob/k  Range: bytes=-0  If-Match: "other"   -> 412  Content-Range: -
			PUT   /blob/k  ""
			read  /blob/k  Range: bytes=-1                      -> 200  ""
		`))
	}
}

func TestReadConditions(t *testing.T) {
	for _, blob := range []string{"{noise 1000}", "{noise 2C+1000}"} {
		tag := "{tag " + blob + "}"
		names := []string{"BLOB", blob, "TAG", tag, "ZIP", "{gzip-tag " + blob + "}"}
		script(t, strings.NewReplacer(names...).Replace(`
			clock  2026-01-02T03:04:05.678Z
			serve
			PUT    /blob/k        BLOB
			read   /blob/k        If-None-Match: TAG       -> 304  ""  ETag: TAG
			read   /blob/k        If-None-Match: ZIP       -> 304  ""  ETag: TAG
			read   /blob/k        If-None-Match: W/TAG     -> 304
			read   /blob/k        If-None-Match: "a", TAG  -> 304
			read   /blob/k        If-None-Match: *         -> 304
			read   /blob/k        If-None-Match: "other"   -> 200  BLOB  ETag: TAG
			read   /blob/k        If-None-Match: nonsense  -> 200  BLOB
			read   /blob/missing  If-None-Match: *         -> 404
			read   /blob/k        If-Match: TAG            -> 200  BLOB
			read   /blob/k        If-Match: ZIP            -> 200  BLOB
			read   /blob/k        If-Match: *              -> 200  BLOB
			read   /blob/k        If-Match: "other"        -> 412  ETag: -
			read   /blob/k        If-Match: W/TAG          -> 412
			read   /blob/missing  If-Match: *              -> 404
			read   /blob/k  If-Modified-Since: Fri, 02 Jan 2026 03:04:05 GMT    -> 304  ""
			read   /blob/k  If-Modified-Since: Fri, 02 Jan 2026 03:04:04 GMT    -> 200  BLOB
			read   /blob/k  If-Unmodified-Since: Fri, 02 Jan 2026 03:04:05 GMT  -> 200  BLOB
			read   /blob/k  If-Unmodified-Since: Fri, 02 Jan 2026 03:04:04 GMT  -> 412
			# If the clock goes back, Last-Modified is still not later than Date.
			clock  -1h
			read   /blob/k  -> 200  BLOB  Last-Modified: Fri, 02 Jan 2026 02:04:05 GMT
			read   /blob/k  If-Modified-Since: Fri, 02 Jan 2026 02:04:05 GMT    -> 304  ""
		`))
	}
}

// A row has the status of a PUT to a key with the content "old", that of a PUT to a missing key,
// and the condition of both.
func TestConditionalWrites(t *testing.T) {
	for _, mode := range []string{"false", "true"} {
		s := script(t, "serve  async_write="+mode)
		for _, row := range table(`
			201  412  If-Match: *
			201  412  If-Match: {tag old}
			201  412  If-Match: {gzip-tag old}
			201  412  If-Match: "a,b" , {tag old},,"c"
			201  412  If-Match: "other"  If-Match: {tag old}
			412  412  If-Match: "other"
			412  412  If-Match: W/{tag old}
			412  412  If-Match: ""
			412  201  If-None-Match: *
			412  201  If-None-Match: {tag old}
			412  201  If-None-Match: W/"x", W/{gzip-tag old}
			201  201  If-None-Match: "other"
			201  412  If-Match: {tag old}  If-None-Match: "other"
			412  412  If-Match: {tag old}  If-None-Match: {tag old}
			400  400  If-Match:
			400  400  If-Match: abc
			400  400  If-Match: "abc
			400  400  If-Match: w/"abc"
			400  400  If-Match: "a" "b"
			400  400  If-Match: *, "a"
			400  400  If-None-Match: ,
			400  400  If-None-Match: "a b"
			400  400  If-Modified-Since: Mon, 01 Jan 2001 00:00:00 GMT
			400  400  If-Match: {tag old}  If-Unmodified-Since: Fri, 01 Jan 2100 00:00:00 GMT
		`) {
			content := "old"
			if row[0] == "201" {
				content = "new"
			}
			condition := strings.Join(row[2:], "  ")
			s.script(strings.NewReplacer("CONDITION", condition, "CONTENT", content).Replace(`
				DELETE  /blob/k
				PUT     /blob/k  CONDITION  new  -> ` + row[1] + `
				PUT     /blob/k  old
				PUT     /blob/k  CONDITION  new  -> ` + row[0] + `
				GET     /blob/k                  -> 200  CONTENT
			`))
		}
		s.script(`
			PUT     /blob/k  old
			DELETE  /blob/k  If-None-Match: *     -> 412  ~precondition failed: If-None-Match names
			DELETE  /blob/k  If-Match: {tag new}  -> 412  ~If-Match does not name
			DELETE  /blob/k  If-Match: abc        -> 400  ~If-Match must be * or a list
			GET     /blob/k                       -> 200  old
			DELETE  /blob/k  If-Match: {tag old}  -> 204
			DELETE  /blob/k  If-Match: *          -> 412
			DELETE  /blob/k  If-None-Match: *     -> 204
			PUT     /blob/k  If-Match: *  {noise 3C}       -> 412
			GET     /blob/k                                -> 404
			PUT     /blob/k  If-None-Match: *  {noise 3C}  -> 201
			PUT     /blob/k  If-None-Match: *  {noise 3C}  -> 412
		`)
	}
}

// Of many creators of one key one wins, and a counter kept with If-Match loses no increment.
func TestConditionalRaces(t *testing.T) {
	const clients, increments = 16, 5
	for _, mode := range []string{"false", "true"} {
		s := script(t, "serve  num_shards=2  async_write="+mode)
		for key := range 8 {
			path := fmt.Sprint("/blob/", key)
			won := make(chan []byte, clients)
			together(clients, func(i int) {
				body := noise(10+key%2*chunkSize, uint64(i))
				if s.status("PUT", path, bytes.NewReader(body), "If-None-Match", "*") == 201 {
					won <- body
				}
			})
			if len(won) != 1 {
				t.Fatalf("async %s, key %d: %d creators won", mode, key, len(won))
			}
			s.wantBlob(fmt.Sprint(key), <-won)
		}
		s.put("n", []byte("0"))
		together(clients, func(int) { s.increment("n", increments, clients*increments) })
		s.script(fmt.Sprint("GET  /blob/n  -> 200  ", clients*increments))
	}
}

// increment adds 1 to a counter so many times. A try fails only if another client has added to it
// since it was read: the tries are enough if they are as many as all clients add.
func (s *testServer) increment(key string, times, tries int) {
	for done := 0; done < times && tries > 0; tries-- {
		resp, body, err := s.do("GET", "/blob/"+key, nil)
		if err != nil {
			s.t.Error(err)
			return
		}
		count, _ := strconv.Atoi(string(body))
		next := strings.NewReader(strconv.Itoa(count + 1))
		status := s.status("PUT", "/blob/"+key, next, "If-Match", resp.Header.Get("ETag"))
		if status == 201 {
			done++
		}
	}
}

const unswept = "SELECT (SELECT count(*) FROM chunks) + (SELECT count(*) FROM orphans)"

// A body that does not match every digest that its client sent is not stored.
func TestDigests(t *testing.T) {
	t.Parallel() // it waits for upkeep
	script(t, `
		serve
		PUT  /blob/k  Repr-Digest: sha-256=:{sha-256 x}:     x  -> 201
		PUT  /blob/k  Content-Digest: sha-512=:{sha-512 x}:  x  -> 201
		PUT  /blob/k  Content-MD5: {md5 x}                   x  -> 201
		PUT  /blob/k  Repr-Digest: sha-256=:{sha-256 y}:     x  -> 400  ~its sha-256 in base64 is
		PUT  /blob/k  Content-Digest: sha-512=:{sha-512 y}:  x  -> 400  ~its sha-512 in base64 is
		PUT  /blob/k  Content-MD5: {md5 y}                   x  -> 400  ~its md5 in base64 is
		PUT /blob/k  Repr-Digest: sha-256=:{sha-256 x}:, sha-512=:{sha-512 y}:  x  -> 400
		PUT /blob/k  Repr-Digest: sha-256=:{sha-256 x}:  Content-Digest: sha-256=:{sha-256 y}:  x  -> 400
		PUT /blob/k  Repr-Digest: sha-256=:{sha-256 y}:  Content-Digest: sha-256=:{sha-256 x}:  x  -> 400
		PUT /blob/k  Repr-Digest: sha-512=:{sha-512 x}:  Content-MD5: {md5 y}  x  -> 400
		GET  /blob/k  -> 200  x  Blob-Version: 2
		# A trailer has the digest of a body that was not known before.
		trailer  /blob/k  x  Content-Digest: sha-256=:{sha-256 x}:  -> 201
		trailer  /blob/k  x  Content-Digest: sha-512=:{sha-512 x}:  -> 201
		trailer  /blob/k  x  Content-Md5: {md5 x}                   -> 201
		trailer  /blob/k  x  Other: sha-256=:AAAA:                  -> 201
		trailer  /blob/t  x  Content-Digest: sha-256=:{sha-256 y}:  -> 400
		trailer  /blob/t  x  Repr-Digest: sha-512=:{sha-512 y}:     -> 400
		trailer  /blob/t  x  Content-Digest: sha-512=1              -> 400
		trailer  /blob/t  x  Content-Md5: {md5 y}                   -> 400
		# It must be announced, except for sha-256.
		send    a  PUT /blob/t  Transfer-Encoding: chunked  1\nx\n0\nRepr-Digest: sha-256=:{sha-256 y}:\n\n
		answer  a  -> 400  ~its sha-256 in base64 is
		send    b  PUT /blob/t  Transfer-Encoding: chunked  1\nx\n0\nContent-MD5: {md5 x}\n\n
		answer  b  -> 400  ~needs a header Trailer
		GET  /blob/t  -> 404
		GET  /blob/k  -> 200  x  Blob-Version: 6
		# Large uploads that are refused leave nothing.
		PUT  /blob/large  Repr-Digest: sha-256=:{sha-256 x}:           {noise 3C}  -> 400
		PUT  /blob/large  Repr-Digest: sha-512=:{sha-512 x}:           {noise 3C}  -> 400
		trailer  /blob/large  {noise 3C}  Content-Digest: sha-512=:{sha-512 x}:    -> 400
		GET  /blob/large  -> 404
		wait sql data  `+unswept+`  -> 0
		PUT  /blob/large  Repr-Digest: sha-256=:{sha-256 {noise 3C}}:  {noise 3C}  -> 201
		PUT  /blob/large  Repr-Digest: sha-512=:{sha-512 {noise 3C}}:  {noise 3C}  -> 201
	`)
}

// putTrailer uploads with a header behind a body of unknown length: "trailer PATH  BODY  HEADER".
func (s *testServer) putTrailer(fields []string) answer {
	s.t.Helper()
	header := headerField.FindStringSubmatch(fields[2])
	body := unknownLength([]byte(fields[1]))
	request, err := http.NewRequest("PUT", s.base+fields[0], body)
	fatal(s.t, err)
	request.Trailer = http.Header{header[1]: {header[2]}}
	resp, err := s.client.Do(request)
	fatal(s.t, err)
	resp.Body.Close()
	return answer{status: strconv.Itoa(resp.StatusCode)}
}

// A digest that the server cannot check is refused. The refusal shows the form.
func TestFormsOfDigests(t *testing.T) {
	script(t, `
		serve
		PUT  /blob/k  Repr-Digest: SHA-256=:{sha-256 x}: ;parameter=1  x  -> 201
		PUT  /blob/k  Repr-Digest: sha-256={sha-256 x}         x  -> 400  ~sha-256=:BASE64: or
		PUT  /blob/k  Content-Digest: sha-512=:{sha-256 x}:    x  -> 400  ~its sha-512 in base64 is
		PUT  /blob/k  Repr-Digest: sha-256={sha-256 x}:        x  -> 400
		PUT  /blob/k  Repr-Digest: sha-256=:{sha-256 x}        x  -> 400
		PUT  /blob/k  Repr-Digest: sha-256=:AAAA:              x  -> 400
		PUT  /blob/k  Repr-Digest: sha-256=:{repeat 43 !}=:    x  -> 400
		PUT  /blob/k  Repr-Digest: sha-256=::                  x  -> 400
		PUT  /blob/k  Repr-Digest: sha-256                     x  -> 400
		PUT  /blob/k  Repr-Digest:                             x  -> 400
		PUT  /blob/k  Content-MD5: {sha-256 x}                 x  -> 400  ~its md5 in base64 is
		# The padding may be missing.
		PUT /blob/k  Repr-Digest: sha-256=:LXEWQrcmsEQBYnyp+6wy9chTD7GQPMTbAiWHF5IaSIE:  x  -> 201
		# An algorithm that the server does not know may stand only beside one that it knows.
		PUT  /blob/k  Repr-Digest: unixsum=:AAA=:, sha-256=:{sha-256 x}:, md5=::  x  -> 201
		PUT  /blob/k  Repr-Digest: id-sha-256=:AAAA:, crc32c=:AAAA:               x  -> 400
		PUT  /blob/k  Content-Digest: md5=:{md5 x}:                               x  -> 400
		PUT  /blob/k  Repr-Digest: sha-256=:{sha-256 x}:, sha-512=:AAAA:          x  -> 400
		PUT  /blob/k  Repr-Digest: sha-256=:{sha-256 x}:, sha-512=AAAA            x  -> 400
		PUT  /blob/k  Repr-Digest: sha-256=:A!:, sha-512=:{sha-512 x}:            x  -> 400
		GET  /blob/k  -> 200  x  Blob-Version: 2
	`)
}

// A blob with a ttl is gone from the millisecond of its Blob-Expires: whatever reads it, cached or
// not, large or small.
func TestExpiry(t *testing.T) {
	for _, size := range []string{"0", "10", "65546", "3C"} {
		script(t, strings.ReplaceAll(`
			clock   2026-01-02T03:04:05.678Z
			serve
			PUT     /blob/k?ttl=90          x  -> 201  Blob-Expires: 2026-01-02T03:05:35.678Z
			PUT     /blob/k?ttl=7d          x  -> 201  Blob-Expires: 2026-01-09T03:04:05.678Z
			read    /blob/k                    -> 200  x  Blob-Expires: 2026-01-09T03:04:05.678Z
			PUT     /blob/k?ttl=            y  -> 400  ~ttl must be whole seconds, days such as 7d
			# A write without a ttl ends it.
			PUT     /blob/k          for ever  -> 201  Blob-Expires: -
			read    /blob/k                    -> 200  for ever  Blob-Expires: -  Blob-Version: 2
			clock   +1m
			PUT     /blob/k?ttl=10s  {noise SIZE}
			clock   +9999ms
			read    /blob/k                    -> 200  {noise SIZE}  Blob-Version: 3
			read    /blob/k                    -> 200  Blob-Created: 2026-01-02T03:04:05.678Z
			PUT     /blob/k  If-None-Match: *  -> 412
			clock   +1ms
			read    /blob/k                    -> 404
			read    /blob/k  If-None-Match: *  -> 404
			list                               -> 0
			PUT     /blob/k  If-Match: *       -> 412
			DELETE  /blob/k  If-Match: *       -> 412
			PUT     /blob/k?ttl=10s  If-None-Match: *  {noise SIZE}  -> 201
			read    /blob/k  -> 200  Blob-Created: 2026-01-02T03:05:15.678Z  Blob-Version: 0
			clock   +10s
			PUT     /blob/k              anew  -> 201
			read    /blob/k                    -> 200  anew  Blob-Version: 0
		`, "SIZE", size))
	}
}

// Upkeep deletes what has expired, and returns its space. A deleted content does not wait for all
// of that. What is being read stays.
func TestExpirySweep(t *testing.T) {
	t.Parallel() // it waits for upkeep
	s := script(t, `
		clock  2026-01-02T03:04:05.678Z
		serve  num_shards=1
		PUT    /blob/read?ttl=1m   {noise 40C}
		PUT    /blob/large?ttl=1m  {noise 3C}
		PUT    /blob/deleted       {noise 20C}
		PUT    /blob/stays         x
	`)
	sh := s.store.shards[0]
	reader, err := sh.read("read", false)
	fatal(t, err)
	// In one transaction "deleted" goes, and many rows come that have expired. The trigger notes
	// how many are left when a chunk of "deleted" is swept.
	exec1(t, sh.path, fmt.Sprintf(`BEGIN IMMEDIATE;
		CREATE TABLE noted AS SELECT id, 0 AS left_over FROM blobs WHERE key = 'deleted';
		CREATE TRIGGER note AFTER DELETE ON chunks WHEN old.id >> 20 = (SELECT id FROM noted)
		BEGIN UPDATE noted SET left_over = (SELECT count(*) FROM blobs); END;
		INSERT INTO orphans SELECT id FROM noted;
		DELETE FROM blobs WHERE key = 'deleted';
		INSERT INTO blobs
			WITH RECURSIVE n (i) AS (SELECT 1000 UNION ALL SELECT i + 1 FROM n LIMIT 2000)
			SELECT i, printf('k%%d', i), 0, x'%x', 0, 0, NULL, 'a/b', 0, 0, %d, 0, x'' FROM n;
		COMMIT`, sha256.Sum256(nil), s.clock.ms.Load()))
	s.script(`
		clock +1m
		GET /blob/read  -> 404
		# "stays" is left, and the content that is being read.
		wait sql data  SELECT (SELECT count(*) FROM blobs) + (SELECT count(*) FROM orphans)  -> 2
		sql data  SELECT left_over >= 1000 FROM noted  -> 1
	`)
	got, err := io.ReadAll(reader)
	isWhole := bytes.Equal(got, noise(40*chunkSize, 1))
	expect(t, err == nil && isWhole, "the read ends with %d bytes, %v", len(got), err)
	reader.close()
	s.script("wait sql data  " + unswept + "  -> 0")
	const most = (vacuumPages + 40) * newPageBytes
	eventually(t, "the space is returned", func() bool { return sizeOf(sh.path) <= most })
}

func TestListing(t *testing.T) {
	script(t, `
		serve
		list                          -> 0
		fill  a  a/  a/b  a/b/c  a0  ab  b  b/1  b/2  ä/日
		list                          -> 10  a a/ a/b a/b/c a0 ab b b/1 b/2 ä/日
		# A prefix is how keys begin. "after" is a key, whether there is one or not.
		list  prefix=a/               -> 3   a/ a/b a/b/c
		list  prefix=none             -> 0
		list  prefix=%00              -> 0
		list  prefix={repeat 1025 k}  -> 0
		list  after=ab                -> 4   b b/1 b/2 ä/日
		list  after=b/0               -> 3   b/1 b/2 ä/日
		list  prefix=a&after=a/b      -> 3   a/b/c a0 ab
		list  prefix=b&after=a        -> 3   b b/1 b/2
		list  prefix=a&after=b        -> 0
		# The last page, full or not, has no next.
		list  limit=2                 -> 2   a a/ next a/
		list  limit=2&after=a/        -> 2   a/b a/b/c next a/b/c
		list  limit=2&after=b/1       -> 2   b/2 ä/日
		list  limit=10000             -> 10  a a/ a/b a/b/c a0 ab b b/1 b/2 ä/日
		# A listing waits for the writes that were answered 202: nothing else ends their window.
		stop
		serve   async_write=true  batch_size=1000  batch_timeout_ms=60000
		DELETE  /blob/a/b                                -> 202
		list    prefix=a/                                -> 2   a/ a/b/c
		PUT     /blob/new  x                             -> 202
		list    delimiter=/                              -> 8   a a0 ab b new [a/] [b/] [ä/]
		PUT     /blob/b/3  x                             -> 202
		GET     /blob/b/             Accept: text/html   -> 200  ~Folders: 0. Files: 3, 7 B.
		GET     /blob/?delimiter=           -> 200
		# What a listing cannot mean is refused.
		GET     /blob/?limit=10001          -> 400  ~limit must be a number from 1 to 10000
		GET     /blob/?limit=0              -> 400  ~limit must be a number from 1 to 10000
		GET     /blob/?limit=%2B5           -> 400  ~limit must be a number from 1 to 10000
		GET     /blob/?limit=               -> 400  ~limit must be a number from 1 to 10000
		GET     /blob/?prefix=%ff           -> 400  ~prefix, after and delimiter must be valid UTF-8
		GET     /blob/?delimiter=%ff        -> 400  ~prefix, after and delimiter must be valid UTF-8
		GET     /blob/?prefix=%c3&after=%a9 -> 400  ~prefix, after and delimiter must be valid UTF-8
	`)
}

// A row of the listing says what HEAD says.
func TestListingRow(t *testing.T) {
	script(t, `
		clock  2026-01-02T03:04:05.678Z
		serve
		GET    /blob/              -> 200  {"blobs":[]}  Content-Type: application/json
		GET    /blob/?delimiter=/  -> 200  {"blobs":[],"prefixes":[]}
		PUT    /blob/f/k  old
		clock  +1s
		PUT    /blob/f/k?ttl=1h  Content-Type: a/b  {noise C+5}
		GET    /blob/  -> 200  ~{"blobs":[{"key":"f/k","size":{count C+5},"content_type":"a/b",
		GET    /blob/  -> 200  ~,"etag":"\"{sum {noise C+5}}\"",
		GET    /blob/  -> 200  ~","created":"2026-01-02T03:04:05.678Z","updated":"
		GET    /blob/  -> 200  ~","updated":"2026-01-02T03:04:06.678Z","version":1,
		GET    /blob/  -> 200  ~,"version":1,"expires":"2026-01-02T04:04:06.678Z"}]}
		PUT    /blob/f/k  new
		GET    /blob/  -> 200  ~,"version":2}]}
		PUT    /blob/z    x
		GET    /blob/?delimiter=/&limit=1  -> 200  {"blobs":[],"prefixes":["f/"],"next":"f/"}
	`)
}

// The order is that of the keys' bytes, whatever they are and however many shards there are.
func TestListingOrder(t *testing.T) {
	for _, shards := range []string{"1", "4"} {
		keys := []string{"é", "\u2028", "\U0010ffff", "odd/\U0010ffff", strings.Repeat("k", 1024)}
		for c := rune(1); c < 128; c++ {
			keys = append(keys, string(c), "odd/"+string(c)+"z")
		}
		s := script(t, "serve  num_shards="+shards)
		s.putAll(keys)
		s.wantPages(url.Values{}, keys)
		isAbove := func(key string) bool { return !strings.HasPrefix(key, "odd/") }
		s.wantPages(url.Values{"prefix": {"odd/"}}, slices.DeleteFunc(keys, isAbove))
	}
}

// A listing and a folder's page have as many rows as there are, over many pages.
func TestListingOfMany(t *testing.T) {
	s := script(t, "serve  num_shards=1")
	s.fillRows(2001)
	s.script(`
		list  limit=2000                     -> 2000  ~ key/00001999 next key/00001999
		list  limit=2001                     -> 2001  !next
		list  limit=10000                    -> 2001  !next
		list  limit=1000&after=key/00001000  -> 1000  !next
		# The default limit is 1000.
		GET   /blob/                         -> 200  ~"next":"key/00000999"  !"key":"key/00001000"
		GET   /blob/key/  Accept: text/html  -> 200  ~<p>Folders: 0. Files: 2001, 0 B.
		# A folder costs one look, however many keys it has: the second one is not read.
		fill    last
		sql     data/shard_0.db  UPDATE blobs SET sha256 = x'' WHERE key = 'key/00000001'
		GET     /blob/?limit=2           -> 500
		list    delimiter=/              -> 2  last [key/]
		DELETE  /blob/key/00000001       -> 204
	`)
	_, page := s.want(200, "GET", "/blob/key/", nil, "Accept", "text/html")
	links := bytes.Count(page, []byte(`href="./`))
	expect(t, links == 2000, "%d links, want 2000", links)
}

// fillRows makes n empty blobs key/00000000 and so on, 20 times as fast as by HTTP. They are
// misplaced if there are several shards. Their ids leave room for other blobs.
func (s *testServer) fillRows(n int) {
	for i := range s.store.shards {
		file := filepath.Join(s.store.dir, shardName(i))
		exec1(s.t, file, fmt.Sprintf(`INSERT INTO blobs
			WITH RECURSIVE n (i) AS (SELECT %d UNION ALL SELECT i + %d FROM n WHERE i + %[2]d < %d)
			SELECT i + 1e6, printf('key/%%08d', i), 0, x'%x', 0, 0, NULL, 'a/b', 1, 1, NULL, 0, x''
			FROM n`,
			i, len(s.store.shards), n, sha256.Sum256(nil)))
	}
}

// A listing without the keys of a shard would be a lie. Blobs of the other shards are served.
func TestListingOfCorruptShard(t *testing.T) {
	script(t, `
		serve
		PUT    /blob/f/k  text
		stop
		write  {shard corrupt}  garbage
		serve
		GET    /blob/                        -> 500  shard is corrupt
		GET    /blob/?prefix=f/&limit=1      -> 500  shard is corrupt
		GET    /blob/    Accept: text/html   -> 500  shard is corrupt
		GET    /blob/f/  Accept: text/html   -> 500  shard is corrupt
		GET    /blob/corrupt                 -> 500  shard is corrupt
		GET    /blob/f/k                     -> 200  text
		GET    /blob/f   Accept: text/html   -> 303
		GET    /blob/missing                 -> 404
		stop
		remove data
	`)
}

// Keys that have the delimiter behind the prefix are one row, a folder. It counts in the limit.
func TestDelimiter(t *testing.T) {
	script(t, `
		clock  2026-01-02T03:04:05.678Z
		serve
		fill   a  a/  a/b  a/b/c  a/b/d  a//  a//x  a0  ab  abab
		fill   b/1  b/2  c/ä/1  c/ä/2  /  //  /x
		PUT    /blob/%F4%8F%BF%BF/1        x
		PUT    /blob/%F4%8F%BF%BF/2        x
		list   delimiter=/                 -> 9  a a0 ab abab [/] [a/] [b/] [c/] [\U0010ffff/]
		list   delimiter=/&prefix=a/       -> 4  a/ a/b [a//] [a/b/]
		list   delimiter=/&prefix=b/       -> 2  b/1 b/2
		list   delimiter=/&prefix=c/       -> 1  [c/ä/]
		list   delimiter=/&prefix=/        -> 3  / /x [//]
		list   delimiter=/&prefix=a        -> 5  a a0 ab abab [a/]
		list   delimiter=/&prefix=a/b      -> 2  a/b [a/b/]
		# It may be any text.
		list   delimiter=b&prefix=a        -> 7  a a/ a// a//x a0 [a/b] [ab]
		list   delimiter=ab&prefix=ab      -> 2  ab [abab]
		list   delimiter=//&prefix=a       -> 9  a a/ a/b a/b/c a/b/d a0 ab abab [a//]
		list   delimiter=ä&prefix=c/       -> 1  [c/ä]
		# Behind a folder comes none of its keys. Behind one of its keys comes the folder.
		list   delimiter=/&limit=3             -> 3  a [/] [a/] next a/
		list   delimiter=/&limit=1&after=a/    -> 1  a0 next a0
		list   delimiter=/&limit=1&after=a/b   -> 1  [a/] next a/
		# What has expired makes no folder.
		PUT    /blob/gone/x?ttl=1s         x
		clock  +1s
		list   delimiter=/&prefix=g        -> 0
	`)
}

// fileLink is a link down from a folder's page, and its name.
var fileLink = regexp.MustCompile(`<tr><td><a href="(\./[^"]*)">([^<]*)</a>`)

// follow walks down the links of a page like a browser, and adds the contents that it finds.
func (s *testServer) follow(from *url.URL, found map[string]string) {
	s.t.Helper()
	_, body := s.want(200, "GET", from.EscapedPath(), nil, "Accept", "text/html")
	text := string(body)
	if !strings.HasPrefix(text, "<!DOCTYPE html>") {
		found[from.Path] = text
		return
	}
	for _, link := range fileLink.FindAllStringSubmatch(text, -1) {
		target, err := from.Parse(html.UnescapeString(link[1]))
		fatal(s.t, err)
		want := from.Path + html.UnescapeString(link[2])
		if target.Path != want {
			s.t.Fatalf("%s: the link %q leads to %q, want %q", from, link[1], target.Path, want)
		}
		s.follow(target, found)
	}
}

// Whoever follows the links of the folder pages finds every blob.
func TestFolderLinks(t *testing.T) {
	s := newTestServer(t)
	keys := strings.Split("k|f/1|f/2/3|f/4|a/b/c/d|x//y|/lead|z/|..hidden|...|a:b| |"+
		"javascript:alert(1)|<b>x</b>|\"q'|%2F|%2E%2E|a?b#c|a+b&c|日本/ä|new\nline|\\back", "|")
	s.putAll(keys)
	s.putAll([]string{"dots/./b", "dots/../b", "dots/."}) // no browser can ask for these
	want := map[string]string{}
	for _, key := range keys {
		want["/blob/"+key] = key
	}
	found := map[string]string{}
	s.follow(&url.URL{Path: "/blob/"}, found)
	expect(t, maps.Equal(found, want), "found %q, want %q", found, want)
}

// A folder's page has the way up, the folders, and the files with what a person asks of them.
func TestFolderPage(t *testing.T) {
	s := script(t, `
		clock  2026-01-02T03:04:05.678Z
		serve
		fill   top  p/q/b.txt  p/q/a&b/1  p/q/z/1  p/q/z/2  p/q/./1  p/q/..
		PUT    /blob/p/q/c  Content-Type: image/png  {noise 2000}
		GET    /blob/  Accept: text/html  -> 200  ~<h1><a>/</a></h1>  !href="../"
		GET    /blob/  Accept: text/html  -> 200  ~<p>Folders: 1. Files: 1, 3 B.
	`)
	_, page := s.want(200, "GET", "/blob/p/q/", nil, "Accept", "text/html")
	_, crumbs, _ := strings.Cut(string(page), "</style>\n")
	crumbs, _, _ = strings.Cut(crumbs, "\n")
	_, rows, _ := strings.Cut(string(page), "<table>")
	const want = `<h1><a href="../../">/</a><a href="../">p/</a><a>q/</a></h1>
<tr><th>Name<th>Size<th>Type<th>Changed (UTC)
<tr><td><a href="../">../</a>
<tr><td><a>./</a>
<tr><td><a href="./a&amp;b/">a&amp;b/</a>
<tr><td><a href="./z/">z/</a>
<tr><td><a>..</a><td>6 B<td>application/octet-stream
<td>2026-01-02 03:04
<tr><td><a href="./b.txt">b.txt</a><td>9 B<td>text/plain; charset=utf-8
<td>2026-01-02 03:04
<tr><td><a href="./c">c</a><td>1.95 KiB<td>image/png
<td>2026-01-02 03:04
</table>
<p>Folders: 3. Files: 3, 1.97 KiB.
`
	expect(t, crumbs+rows == want, "%s\nwant %s", crumbs+rows, want)
}

// The policy of a page allows its upload script, by the hash, and no other script.
func TestPagePolicy(t *testing.T) {
	s := script(t, "serve\nfill  f/1")
	for _, page := range []string{"/", "/blob/", "/blob/f/"} {
		_, body := s.want(200, "GET", page, nil, "Accept", "text/html")
		text := string(body)
		script := uploadScript
		if page != "/" {
			_, rest, _ := strings.Cut(text, "<script>")
			script, _, _ = strings.Cut(rest, "</script>")
		}
		s.script("GET " + page + "  Accept: text/html  -> 200  Content-Security-Policy: " +
			"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-" +
			brace("sha-256", script) + "'; connect-src 'self'; frame-ancestors 'self'")
		others := strings.Replace(text, "<script>"+script+"</script>", "", 1)
		refused := regexp.MustCompile(`<script|<[a-z]+ [^>]*\bon[a-z]+=`).FindString(others)
		expect(t, refused == "", "%s has a script that the policy refuses: %q", page, refused)
	}
}

// A browser that asks for a folder without its slash is sent on. Others are told how to list it.
func TestFolderRedirects(t *testing.T) {
	script(t, `
		serve
		fill  photos/2026/1  photos/file  a b/ü#/1  x//1  dot/../1
		GET   /blob/photos           Accept: text/html,*/*;q=0.8  -> 303  Cache-Control: no-store
		HEAD  /blob/photos           Accept: text/html  -> 303  Location: /blob/photos/
		GET   /blob/photos/2026      Accept: text/html  -> 303  Location: /blob/photos/2026/
		GET   /blob/a%20b/%C3%BC%23  Accept: text/html  -> 303  Location: /blob/a%20b/%C3%BC%23/
		GET   /blob                  Accept: text/html  -> 303  Location: /blob/
		GET   /blob/x%2F             Accept: text/html  -> 200  ~href="../"
		# There is no folder, or no browser can ask for it.
		read  /blob/photo            Accept: text/html  -> 404  ~listed by /blob/?prefix=photo/
		read  /blob/dot/%2E%2E       Accept: text/html  -> 404  ~listed by /blob/?prefix=dot/../
		read  /blob/photos/file/     Accept: text/html  -> 404  not found: no blob under this key
		read  /blob?x=1              Accept: text/html  -> 400
		# Programs
		read  /blob/photos           -> 404  ~no blob under this key; keys below it
		read  /blob/photos           -> 404  ~listed by /blob/?prefix=photos/
		read  /blob/photos/          -> 404  ~listed by /blob/?prefix=photos/
		read  /blob/a%20b/%C3%BC%23  -> 404  ~listed by /blob/?prefix=a+b/%C3%BC%23/
		list  prefix=a+b/%C3%BC%23/  -> 1    a b/ü#/1
		read  /blob                  -> 404  not found: blobs are at /blob/KEY
		PUT   /blob  x               -> 405  Allow: GET, HEAD
	`)
}

// With public_read, whoever has no token learns of nothing but blobs by their keys.
func TestFolderAccess(t *testing.T) {
	script(t, `
		serve  auth_token=sekret  public_read=true
		PUT  /blob/f/1    Authorization: Bearer sekret  text
		GET  /blob/f/1    Accept: text/html  -> 200  text
		GET  /blob/       Accept: text/html  -> 401  unauthorized
		GET  /blob/f/     Accept: text/html  -> 401  unauthorized
		GET  /blob/none/  Accept: text/html  -> 401  unauthorized
		GET  /blob        Accept: text/html  -> 401  unauthorized
		GET  /blob/f      Accept: text/html  -> 404  ~listed by /blob/?prefix=f/
		GET  /blob/g      Accept: text/html  -> 404  ~listed by /blob/?prefix=g/
		GET  /blob/f/     Accept: text/html  Authorization: Bearer sekret  -> 200
		GET  /blob/f      Accept: text/html  Authorization: Bearer sekret  -> 303
	`)
}

// A path has an answer for people and one for programs. Caches are told so by Vary.
func TestPagesAndTexts(t *testing.T) {
	script(t, `
		serve
		fill  f/1
		GET   /               Accept: text/html  -> 200  Vary: Accept  ~<a href="blob/">
		HEAD  /               Accept: text/html  -> 200  Content-Type: text/html; charset=utf-8
		read  /                                  -> 200  Vary: Accept  ~FILE http://127.0.0.1:
		read  /                                  -> 200  Content-Type: text/plain; charset=utf-8
		GET   /blob/          Accept: text/html  -> 200  Vary: Accept  ~<table>
		read  /blob/                             -> 200  Vary: Accept  ~{"blobs":[{"key":"f/1",
		GET   /blob/?limit=1  Accept: text/html  -> 200  Vary: Accept  ~{"blobs":[{"key":"f/1",
		HEAD  /blob/f/        Accept: text/html  -> 200  Content-Type: text/html; charset=utf-8
		GET   /blob/f/        Accept: text/html  -> 200  Vary: Accept
		read  /blob/f/                           -> 404  Vary: Accept
		GET   /blob/f         Accept: text/html  -> 303  Vary: Accept
	`)
}

// A browser finds a folder also beside a shard that is corrupt or locked, and without waiting.
func TestFolderBesideSickShard(t *testing.T) {
	script(t, `
		serve   num_shards=2  async_write=true
		PUT     /blob/f/1  v  -> 202
		PUT     /blob/f/2  v  -> 202
		list    prefix=f  -> 2
		lock    data/shard_0.db
		`+each(1, 9, "PUT  /blob/%d  v  -> 202")+`
		GET     /blob/f     Accept: text/html  -> 303  Location: /blob/f/
		unlock
	`)
}

// A page, a read and a piece of upkeep cost the same however many blobs there are: an index finds
// their rows, in the wanted order.
func TestQueryPlans(t *testing.T) {
	s := newTestServer(t, oneShard)
	costly := regexp.MustCompile("SCAN (blobs|chunks)|TEMP")
	for _, query := range []string{rowQuery, pageQuery, lookQuery, expiredQuery, sweepQuery} {
		arguments := slices.Repeat([]any{1}, strings.Count(query, "?"))
		rows, err := s.store.shards[0].readers.Query("EXPLAIN QUERY PLAN "+query, arguments...)
		fatal(t, err)
		for rows.Next() {
			var id int
			var step string
			fatal(t, rows.Scan(&id, &id, &id, &step))
			expect(t, !costly.MatchString(step), "%s\n%s", query, step)
		}
		fatal(t, rows.Close())
	}
}

// readsUntilError counts down the reads of failing_read. The one that reaches 0 fails.
var readsUntilError atomic.Int64

func init() {
	sqlite.MustRegisterScalarFunction("failing_read", 0,
		func(*sqlite.FunctionContext, []driver.Value) (driver.Value, error) {
			if readsUntilError.Add(-1) == 0 {
				return nil, errors.New("a transient error")
			}
			return int64(1), nil
		})
}

// failRead makes a GET of which a read of a chunk fails: "fail-read 2  /blob/k" fails the second.
func (s *testServer) failRead(fields []string) answer {
	s.t.Helper()
	sh := s.store.shards[0]
	sh.dataStmt.Close()
	var err error
	sh.dataStmt, err = sh.readers.Prepare("SELECT data FROM chunks WHERE id = ? AND failing_read()")
	fatal(s.t, err)
	readsUntilError.Store(int64(byteCount(fields[0])))
	return s.request("GET", fields[1:])
}

// packed answers whether a content is stored deflated: "packed CONTENT -> true".
func (s *testServer) packed(fields []string) answer {
	b := &blob{}
	b.packFirst([]byte(fields[0][:min(len(fields[0]), chunkSize)]), true)
	return answer{status: fmt.Sprint(b.deflated)}
}

// compressible answers whether a blob is worth sending as gzip: "compressible SIZE  TYPE -> true".
func (s *testServer) compressible(fields []string) answer {
	b := &blob{size: int64(byteCount(fields[0])), contentType: fields[1]}
	return answer{status: fmt.Sprint(b.isCompressible())}
}

// accepts answers whether values of Accept-Encoding accept gzip: "accepts VALUE  VALUE -> true".
func (s *testServer) accepts(fields []string) answer {
	header := http.Header{"Accept-Encoding": fields}
	return answer{status: fmt.Sprint(acceptsGzip(header))}
}

// signature returns the HMAC of words, a line each, in hexadecimal. The first word is the key.
func signature(words string) string {
	key, text, _ := strings.Cut(words, " ")
	sum := hmac.New(sha256.New, []byte(key))
	io.WriteString(sum, strings.ReplaceAll(text, " ", "\n"))
	return fmt.Sprintf("%x", sum.Sum(nil))
}

// A blob is stored deflated if that saves an eighth of its first chunk.
func TestPack(t *testing.T) {
	script(t, `
		# a short content
		packed {prose 255}                           -> false
		packed {prose 256}                           -> true
		packed {noise 5000}                          -> false
		packed {noise 2500}{prose 2500}              -> true
		# a longer one, of which the middle must promise it
		packed {noise 9000}{prose 5000}{noise 9000}  -> false
		packed {prose 9000}{noise 5000}{prose 9000}  -> false
		# chunks
		packed {prose 1C}                            -> true
		packed {noise 1C}                            -> false
		packed {prose 1C}{noise 1C}                  -> true
		packed {noise 1C}{prose 1C}                  -> false
	`)
	chunk := make([]byte, 80)
	expect(t, isWorthwhile(chunk, chunk[:70]), "70 bytes of 80 are not few enough")
	expect(t, !isWorthwhile(chunk, chunk[:71]), "71 bytes of 80 are few enough")
}

// A content of any size comes back, whatever storage_compression says then and now.
func TestStorageCompression(t *testing.T) {
	forms := []string{"{prose N}", "{noise N}", "{prose N}{noise N}", "{noise N}{prose N}"}
	puts := ""
	gets := ""
	for _, size := range strings.Fields("0 1 256 20000 1C-1 1C 1C+1 2C 5C+77") {
		for i, form := range forms {
			path := fmt.Sprintf("/blob/%s/%d", size, i)
			content := strings.ReplaceAll(form, "N", size)
			puts += "PUT " + path + "  " + content + "\n"
			gets += "GET " + path + "  -> 200  " + content + "\n"
			gets += "GET " + path + "  Accept-Encoding: gzip  -> 200  " + content + "\n"
		}
	}
	on := "serve output_compression=true  storage_compression=true\n" + gets
	off := "serve output_compression=true  storage_compression=false\n" + gets
	s := script(t, "serve storage_compression=true\n"+puts+"stop\n"+on+"stop\n"+off)
	s.script(puts + gets + "stop\n" + on)
}

func TestRangesOfDeflated(t *testing.T) {
	script(t, `
		serve  storage_compression=true
		PUT /blob/k  {prose 3C+77}
		sql data  SELECT count(*) FROM blobs WHERE codec = 1  -> 1
		GET /blob/k  Range: bytes=0-0            -> 206  {prose 3C+77 0:1}
		GET /blob/k  Range: bytes=262143-262144  -> 206  {prose 3C+77 1C-1:1C+1}
		GET /blob/k  Range: bytes=262144-524287  -> 206  {prose 3C+77 1C:2C}
		GET /blob/k  Range: bytes=10-786442      -> 206  {prose 3C+77 10:3C+11}
		GET /blob/k  Range: bytes=786432-        -> 206  {prose 3C+77 3C:3C+77}
		GET /blob/k  Range: bytes=-78            -> 206  {prose 3C+77 3C-1:3C+77}
	`)
}

// A range reads the chunks it touches and no other. Damage in the first of them is an error. Damage
// in a later one cuts the connection. A damaged blob can be deleted.
func TestRangeReadsItsChunks(t *testing.T) {
	damages := []string{"UPDATE chunks SET data = substr(data, 2)", "DELETE FROM chunks"}
	for _, content := range []string{"prose 4C", "noise 4C"} {
		for _, damage := range damages {
			row := strings.NewReplacer("CONTENT", content, "DAMAGE", damage)
			script(t, row.Replace(`
				serve  num_shards=1  storage_compression=true  output_compression=true
				PUT /blob/k  Content-Type: text/plain  {CONTENT}
				# DAMAGE in the third chunk of {CONTENT}
				sql data/shard_0.db  DAMAGE WHERE id & 1048575 = 2
				GET /blob/k                               -> 200  cut  {CONTENT}
				GET /blob/k  Accept-Encoding: gzip        -> 200  cut
				# DAMAGE in the first and third chunk of {CONTENT}
				sql data/shard_0.db  DAMAGE WHERE id & 1048575 = 0
				GET /blob/k  Range: bytes=262144-524287   -> 206  {CONTENT 1C:2C}
				GET /blob/k  Range: bytes=262149-524288   -> 206  cut  {CONTENT 1C+5:2C}
				GET /blob/k  Range: bytes=262149-1048575  -> 206  cut  {CONTENT 1C+5:2C}
				GET /blob/k  Range: bytes=10-20           -> 500  Content-Range: -
				GET /blob/k  Range: bytes=0-              -> 500  ETag: -  Accept-Ranges: -
				GET /blob/k  Range: bytes=524288-524288   -> 500  Content-Range: -
				GET /blob/k  Range: bytes=524288-         -> 500  Content-Range: -
				GET /blob/k  Range: lines=1               -> 500  ~the blob is damaged
				GET /readyz                               -> 200
				HEAD /blob/k                              -> 200
				DELETE /blob/k                            -> 204
			`))
		}
	}
}

// The chunks of a blob are swept, too, if its row does not say any more that it has chunks.
func TestDeleteOfDamagedRow(t *testing.T) {
	t.Parallel() // it waits for upkeep
	script(t, `
		serve     num_shards=1
		PUT       /blob/k  {noise 2C}
		sql       data/shard_0.db  UPDATE blobs SET size = 'x'
		GET       /blob/k                -> 500  ~the blob is damaged
		GET       /blob/                 -> 500  ~the blob is damaged
		log       error="key \"k\": the blob is damaged -> 1
		log       level=ERROR msg=request      -> 2
		DELETE    /blob/k                -> 204
		wait sql  data  `+unswept+`      -> 0
		# One that expires is swept, too.
		PUT       /blob/l?ttl=1h  {noise 2C}
		sql       data/shard_0.db  UPDATE blobs SET size = 'x', expires_at = 1
		wait sql  data  `+unswept+`      -> 0
		GET       /readyz                -> 200
	`)
}

// A shard in which a value is of the wrong type is corrupt, alone. check goes on with the others.
func TestValueOfWrongType(t *testing.T) {
	script(t, `
		serve
		PUT    /blob/k  v
		stop
		sql    {shard other}  UPDATE meta SET value = 'x' WHERE key = 'num_shards'
		blobnom check data        -> 1  ~{home other}shard is corrupt  ~: 4 shards, 1 blobs
		serve
		GET    /blob/k            -> 200  v
		GET    /blob/other        -> 500  shard is corrupt
		stop
		remove data
	`)
}

// One read that fails is an error of its request, however the request is answered.
func TestReadError(t *testing.T) {
	script(t, `
		serve  num_shards=1  output_compression=true
		PUT /blob/k  Content-Type: text/plain  {prose 3C}
		# before anything is sent
		fail-read 1  /blob/k                         -> 500  internal error
		fail-read 1  /blob/k  Accept-Encoding: gzip  -> 500  Content-Encoding: -  internal error
		fail-read 1  /blob/k  If-None-Match: "x"     -> 500  internal error
		fail-read 1  /blob/k  If-None-Match: "x"  Accept-Encoding: gzip  -> 500  internal error
		fail-read 1  /blob/k  Range: bytes=5-600000  -> 500  Content-Range: -  internal error
		log a transient error  -> 5
		# in the middle
		fail-read 2  /blob/k                         -> 200  cut  {prose 3C}
		fail-read 2  /blob/k  Accept-Encoding: gzip  -> 200  cut
		fail-read 2  /blob/k  If-None-Match: "x"     -> 200  cut  {prose 3C}
		fail-read 2  /blob/k  If-None-Match: "x"  Accept-Encoding: gzip  -> 200  cut
		fail-read 2  /blob/k  Range: bytes=5-600000  -> 206  cut  {prose 3C 5:600001}
		log a transient error  -> 10
		# afterwards
		GET /blob/k   -> 200  {prose 3C}
		metric blobnom_http_requests_total{route="/blob/{key...}",method="GET",code="0"}  -> 5
	`)
}

// A client gets gzip if it accepts that at least as gladly as the content as it is.
func TestAcceptsGzip(t *testing.T) {
	script(t, `
		accepts                               -> false
		accepts gzip                          -> true
		accepts GZIP                          -> true
		accepts x-gzip                        -> false
		accepts gzip, deflate, br             -> true
		accepts br;q=1.0, gzip;q=0.8, *;q=0.1  -> true
		accepts *                             -> true
		accepts *;q=0                         -> false
		accepts gzip;q=0                      -> false
		accepts gzip;q=0.001                  -> true
		accepts gzip;q=0, *                   -> false
		accepts *, gzip;q=0                   -> false
		accepts identity                      -> false
		accepts identity;q=0, *               -> true
		accepts identity;q=0, gzip;q=0        -> false
		accepts gzip;q=0.5, identity;q=0.6    -> false
		accepts gzip;q=0.5, identity;q=0.5    -> true
		accepts identity, *;q=0.5             -> false
		accepts gzip ; q=1                    -> true
		accepts gzip;Q=0.3                    -> true
		accepts gzip;q=2                      -> true
		accepts gzip;q=                       -> true
		accepts gzip;q=0.1234                 -> true
		accepts gzip;q=-1                     -> false
		accepts gzip;q=NaN                    -> false
		accepts gzip;q=1;x=y                  -> true
		accepts ,,gzip,                       -> true
		accepts gz ip                         -> false
		accepts gzip;q=1;q=0                  -> false
		# two headers
		accepts br  gzip                      -> true
		accepts gzip  identity;q=1            -> true
		accepts gzip;q=0.5  identity          -> false
	`)
}

// A blob that is not stored deflated is sent as gzip where that is worth the time.
func TestIsCompressible(t *testing.T) {
	script(t, `
		compressible 1024  text/plain                -> true
		compressible 1023  text/plain                -> false
		compressible 2000  text/html; charset=utf-8  -> true
		compressible 2000  Application/JSON          -> true
		compressible 2000  application/problem+json  -> true
		compressible 2000  application/jsonx         -> false
		compressible 2000  application/octet-stream  -> false
		compressible 2000  font/ttf                  -> true
		compressible 2000  font/woff2                -> false
		compressible 2000  image/png                 -> false
		compressible 2000  image/svg+xml             -> false
	`)
}

// A blob is sent as gzip to clients that accept it. A range is of the content as it is, always.
func TestOutputCompression(t *testing.T) {
	for _, content := range []string{"prose 5000", "prose 3C+5", "noise 5000"} {
		for _, storage := range []string{"true", "false"} {
			row := strings.NewReplacer("STORAGE", storage, "CONTENT", content,
				"PLAIN", "{tag {"+content+"}}", "ZIPPED", "{gzip-tag {"+content+"}}",
				"GZIP", "Accept-Encoding: br, gzip", "VARIES", "Vary: Accept-Encoding")
			script(t, row.Replace(`
				serve  output_compression=true  storage_compression=STORAGE
				PUT  /blob/k  Content-Type: text/plain  {CONTENT}
				read /blob/k        -> 200  ETag: PLAIN  VARIES  Content-Encoding: -  {CONTENT}
				read /blob/k  GZIP  -> 200  ETag: ZIPPED  VARIES  Content-Encoding: gzip  {CONTENT}
				read /blob/k  GZIP  -> 200  Content-Type: text/plain  Repr-Digest: -
				# a range
				GET  /blob/k  GZIP  Range: bytes=3-5  -> 206  ETag: PLAIN  Content-Encoding: -
				GET  /blob/k  GZIP  Range: bytes=3-5  -> 206  VARIES  {CONTENT 3:6}
				GET  /blob/k  GZIP  Range: bytes=3-5  If-Range: ZIPPED  -> 200  {CONTENT}
			`))
		}
	}
}

// Without output_compression nobody gets gzip, and nobody gets as gzip what does not compress.
func TestNoOutputCompression(t *testing.T) {
	script(t, `
		serve  storage_compression=true
		PUT /blob/k  Content-Type: text/plain  {prose 5000}
		GET /blob/k  Accept-Encoding: gzip  -> 200  Vary: -  Content-Encoding: -  {prose 5000}
		GET /blob/k  Accept-Encoding: gzip  -> 200  ETag: {tag {prose 5000}}
		stop
		serve  output_compression=true
		PUT /blob/k  Content-Type: image/png  {prose 5000}
		GET /blob/k  Accept-Encoding: gzip  -> 200  Vary: -  Content-Encoding: -  {prose 5000}
	`)
}

// The length of a blob as gzip is known before it is sent, if it is stored deflated.
func TestLengthOfGzip(t *testing.T) {
	s := script(t, `
		serve  output_compression=true  storage_compression=true
		PUT  /blob/k  {prose 3C}
		read /blob/k  Accept-Encoding: gzip  -> 200  {prose 3C}
	`)
	want := 20 + countRows(t, s.path("data"), "SELECT coalesce(sum(stored), 0) FROM blobs")
	resp, _ := s.want(200, "GET", "/blob/k", nil, "Accept-Encoding", "gzip")
	expect(t, resp.ContentLength == want, "%d bytes, want %d", resp.ContentLength, want)
}

// Each of the two tags of a content names it, whatever the client accepts. A 304 has the tag of the
// 200.
func TestEitherTag(t *testing.T) {
	for accept, tag := range map[string]string{"gzip": "ZIPPED", "identity": "PLAIN"} {
		text := strings.ReplaceAll(`
			clock  2026-01-02T03:04:05.678Z
			serve  output_compression=true
			PUT /blob/k  Content-Type: text/plain  CONTENT
			GET /blob/k  ACCEPT                                -> 200  ETag: TAG  CONTENT
			GET /blob/k  ACCEPT  If-None-Match: "x"            -> 200  ETag: TAG  CONTENT
			GET /blob/k  ACCEPT  If-None-Match: *              -> 304  ETag: TAG
			GET /blob/k  ACCEPT  If-None-Match: PLAIN          -> 304  ETag: TAG
			GET /blob/k  ACCEPT  If-None-Match: W/PLAIN        -> 304  ETag: TAG
			GET /blob/k  ACCEPT  If-None-Match: ZIPPED         -> 304  ETag: TAG
			GET /blob/k  ACCEPT  If-None-Match: "x", W/ZIPPED  -> 304  ETag: TAG
			GET /blob/k  ACCEPT  If-None-Match: *              -> 304  VARIES  Content-Encoding: -
			GET /blob/k  ACCEPT  If-Match: "x",PLAIN           -> 200  ETag: TAG  CONTENT
			GET /blob/k  ACCEPT  If-Match: "x",ZIPPED          -> 200  ETag: TAG  CONTENT
			GET /blob/k  ACCEPT  If-Match: "x"                 -> 412  VARIES  Content-Encoding: -
			GET /blob/k  ACCEPT  If-Match: "x"                 -> 412  ETag: -
			GET /blob/k  ACCEPT  If-Modified-Since: NOW        -> 304  ETag: TAG
			GET /blob/k  ACCEPT  If-Modified-Since: NOW  If-None-Match: "x"  -> 200  ETag: TAG
		`, "TAG", tag)
		words := strings.NewReplacer("ACCEPT", "Accept-Encoding: "+accept, "CONTENT", "{prose 3C}",
			"PLAIN", "{tag {prose 3C}}", "ZIPPED", "{gzip-tag {prose 3C}}",
			"NOW", "Fri, 02 Jan 2026 03:04:05 GMT", "VARIES", "Vary: Accept-Encoding")
		script(t, words.Replace(text))
	}
}

func FuzzFields(f *testing.F) {
	b := &blob{sum: [sha256.Size]byte{1}}
	plain, _ := b.etags()
	sum := "sha-256=:" + base64.StdEncoding.EncodeToString(b.sum[:]) + ":"
	for _, seed := range []string{
		"*", plain + `, W/"b"`, "W/" + plain,
		sum, sum + ", sha-512=:AAAA:", "sha-256=:AAAA:",
		"gzip;q=0.5, *;q=0", "90s", "1.5h", "876001h", "",
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, value string) {
		tryConditions(t, b, value)
		tryDigests(t, value)
		isNamed := strings.Contains(value, "*") || strings.Contains(strings.ToLower(value), "gzip")
		isAccepted := acceptsGzip(http.Header{"Accept-Encoding": {value}})
		expect(t, isNamed || !isAccepted, "%q accepts gzip", value)
		ttl, err := parseTTL(value)
		expect(t, err != nil || ttl > 0 && ttl <= maxTTL, "%q: %v", value, ttl)
	})
}

// tryConditions wants that a list of tags says the same when each tag has a line of its own.
func tryConditions(t *testing.T, b *blob, value string) {
	cond, err := conditionsOf(http.Header{"If-Match": {value}})
	if err != nil {
		return
	}
	strong := b.matchesStrongly(cond.match)
	weak := b.matchesWeakly(cond.match)
	isStar := strings.Trim(value, " \t,") == "*"
	isNamed := isStar || strings.Contains(value, fmt.Sprintf("%x", b.sum))
	expect(t, weak || !strong, "%q names the blob, but not weakly", value)
	expect(t, isNamed || !weak, "%q does not name the blob", value)
	expect(t, strong || !isStar, "%q names every blob", value)
	tags := entityTag.FindAllString(value, -1)
	if tags == nil {
		return
	}
	again, err := conditionsOf(http.Header{"If-Match": tags})
	fatal(t, err)
	isSame := b.matchesStrongly(again.match) == strong && b.matchesWeakly(again.match) == weak
	expect(t, isSame, "%q, line by line: %+v", value, again)
}

// tryDigests wants that each digest in a header is the same in a header of its own.
func tryDigests(t *testing.T, value string) {
	sums, err := digestsOf(http.Header{"Repr-Digest": {value}})
	isFound := len(sums) > 0
	expect(t, isFound == (err == nil), "%q: %v, %v", value, sums, err)
	for _, each := range sums {
		text := each.name + "=:" + each.sum + ":"
		again, err := digestsOf(http.Header{"Content-Digest": {text}})
		fatal(t, err)
		expect(t, slices.Equal(again, []digest{each}), "%q: %s is %v", value, text, again)
	}
}

// A chunk that is deflated can be inflated to its own size, and to no other.
func FuzzCodec(f *testing.F) {
	f.Add([]byte("text text text"), 1)
	f.Add(prose(1000, 1), 300)
	f.Fuzz(tryCodec)
}

func tryCodec(t *testing.T, seed []byte, repeat int) {
	repeat = min(max(repeat, 0), chunkSize)
	chunk := bytes.Repeat(seed, 1+repeat/(len(seed)+1))
	chunk = chunk[:min(len(chunk), chunkSize)]
	size := int64(len(chunk))
	data := deflate(chunk)
	got, err := inflate(data, size)
	isSame := err == nil && bytes.Equal(got, chunk)
	expect(t, isSame, "%d bytes of %d, %v", len(got), size, err)
	_, err = inflate(data, size+1)
	expect(t, errors.Is(err, errDamaged), "one byte more than %d: %v", size, err)
	if size > 0 {
		_, err = inflate(data, size-1)
		expect(t, errors.Is(err, errDamaged), "one byte less than %d: %v", size, err)
	}
	inflate(seed, int64(repeat)) // no panic
}

// The answer to a range has the bytes that its Content-Range says, or all bytes, or it is 416.
func FuzzRange(f *testing.F) {
	s := newTestServer(f)
	small := noise(100, 3)
	large := noise(chunkSize+100, 4)
	s.put("small", small)
	s.put("large", large)
	for _, seed := range strings.Fields("bytes=0-1 bytes=262143-262150 bytes=-1,0-0 bytes=-0 ,") {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, header string) {
		s.t = t
		s.tryRange("small", small, header)
		s.tryRange("large", large, header)
	})
}

func (s *testServer) tryRange(key string, content []byte, header string) {
	resp, got, err := s.do("GET", "/blob/"+key, nil, "Range", header)
	if err != nil && strings.Contains(err.Error(), "invalid header field value") {
		return // the client does not send it
	}
	fatal(s.t, err)
	said := resp.Header.Get("Content-Range")
	want := fmt.Sprintf("200 %s", content)
	switch resp.StatusCode {
	case 206:
		var from, to int
		fmt.Sscanf(said, "bytes %d-%d", &from, &to)
		want = fmt.Sprintf("206 %s", content[from:to+1])
		total := fmt.Sprintf("/%d", len(content))
		expect(s.t, strings.HasSuffix(said, total), "%q: %s", header, said)
	case 416:
		want = "416 range not satisfiable\n"
	}
	isRight := fmt.Sprintf("%d %s", resp.StatusCode, got) == want
	expect(s.t, isRight, "%s, %q: %s, %s, %.40q", key, header, resp.Status, said, got)
}

// dial sends the beginning of a request over a connection of its own.
func (s *testServer) dial(request string) net.Conn {
	s.t.Helper()
	conn, err := net.Dial("tcp", strings.TrimPrefix(s.base, "http://"))
	fatal(s.t, err)
	s.t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(20 * time.Second))
	io.WriteString(conn, request)
	return conn
}

// A content above max_blob_bytes is refused, and what was there stays.
func TestMaxBlobBytes(t *testing.T) {
	t.Parallel() // it waits for upkeep
	for _, limit := range []string{"100", "262144", "524289"} {
		script(t, strings.ReplaceAll(`
			# max_blob_bytes=LIMIT
			serve  max_blob_bytes=LIMIT
			PUT /blob/k  {noise LIMIT}    -> 201
			PUT /blob/k  {prose LIMIT+1}  -> 413  ~max_blob_bytes is LIMIT
			PUT /blob/k  Transfer-Encoding: chunked  {prose LIMIT}     -> 201
			PUT /blob/k  Transfer-Encoding: chunked  {noise LIMIT+1}   -> 413  ~max_blob_bytes
			PUT /blob/k  Transfer-Encoding: chunked  {noise LIMIT+1C}  -> 413  ~max_blob_bytes
			GET /blob/k                   -> 200  {prose LIMIT}
			wait sql data  SELECT count(*) FROM orphans  -> 0
		`, "LIMIT", limit))
	}
	script(t, `
		serve  max_blob_bytes=0
		PUT /blob/k  {noise 3C}  -> 201
		GET /blob/k              -> 200  {noise 3C}
	`)
}

// A client that sends too large a body sees the 413, also if it sends on or has not begun.
func TestTooLargeBody(t *testing.T) {
	for _, limit := range []string{"100", "524289"} {
		s := script(t, "serve  max_blob_bytes="+limit+`
			send   early  PUT /blob/k  Content-Length: 600000  Expect: 100-continue
			answer early  -> 413
		`)
		for i := range 10 {
			s.script(strings.ReplaceAll(`
				send   NAME  PUT /blob/k  Transfer-Encoding: chunked  Expect: 100-continue  400000\n{repeat 16C x}\n0\n\n
				answer NAME  -> 100
				answer NAME  -> 413  ~max_blob_bytes
				ends   NAME
			`, "NAME", fmt.Sprint("client", i)))
		}
	}
}

// Memory follows what has arrived, not what was announced.
func TestChunkReader(t *testing.T) {
	chunks := &chunkReader{body: strings.NewReader("abc")}
	chunk, more, err := chunks.next(1 << 30)
	expect(t, err == nil && !more && string(chunk) == "abc", "%q, %v, %v", chunk, more, err)
	expect(t, cap(chunk) < 20_000, "%d bytes of memory for 3", cap(chunk))
}

func TestHealth(t *testing.T) {
	script(t, `
		serve  num_shards=2
		GET /healthz  -> 200  ok
		GET /readyz   -> 200  ~{"ready":true,"shards":[{"failed_background_writes":0,"ready":true,
		GET /readyz   -> 200  Content-Type: application/json  ~"ready":true,"shard":1}]}
		GET /         -> 200  ~Blobnom devel, a small sharded blob server
	`)
}

// stuckWrites are answered 202 while another process has the lock. A try to commit them takes 200 ms.
const stuckWrites = `
	serve   num_shards=1  async_write=true
	writer  PRAGMA busy_timeout = 200
	lock    data/shard_0.db
	PUT     /blob/k  v  -> 202
	PUT     /blob/l  v  -> 202
`

// A stop waits for another process that has locked a shard. Nothing that was answered 202 is lost.
func TestStopWaitsForLock(t *testing.T) {
	t.Parallel() // it mostly waits
	s := script(t, stuckWrites)
	stopped := make(chan error)
	go func() { stopped <- s.stop() }()
	<-s.store.stopping.Done()
	enough := s.store.batches.Load() + 2
	eventually(t, "tried again", func() bool { return s.store.batches.Load() >= enough })
	s.script("unlock")
	fatal(t, <-stopped)
	s.script(`
		log answered 202 failed  -> 0
		serve  num_shards=1
		GET /blob/k  -> 200  v
		GET /blob/l  -> 200  v
	`)
}

// A lock that stays does not keep the server from ending. What is lost is in the log.
func TestStopDespiteLock(t *testing.T) {
	t.Parallel() // it mostly waits
	s := script(t, stuckWrites)
	s.store.drainTimeout = time.Second
	stopped := make(chan error, 1)
	go func() { stopped <- s.stop() }()
	select {
	case err := <-stopped:
		fatal(t, err)
	case <-time.After(drainTimeout):
		t.Fatal("the server does not end")
	}
	s.script(`
		log answered 202 failed  -> 2  ~key=k  ~key=l
		log shard is ready again -> 0
	`)
}

// closed has requests that public_read does not open.
const closed = `
	PUT    /blob/k  v  -> 401  unauthorized
	POST   /blob/k  v  -> 401  unauthorized
	DELETE /blob/k     -> 401  unauthorized
	PATCH  /blob/k     -> 401  unauthorized
	GET    /blob/      -> 401  unauthorized
	HEAD   /blob/      -> 401
	GET    /           -> 401  unauthorized
	GET    /metrics    -> 401  unauthorized
	GET    /nothing    -> 401  unauthorized
	GET    /blob/../x  -> 401  unauthorized
`

// Without a token nothing but the health routes is open.
func TestNoToken(t *testing.T) {
	script(t, `
		serve  auth_token=sekret  read_token=reader
		GET  /blob/k   -> 401  WWW-Authenticate: Bearer, Basic realm="blobnom", charset="UTF-8"
		GET  /blob/k   -> 401  unauthorized
		HEAD /blob/k   -> 401
		GET  /blob/a/  -> 401  unauthorized
		GET  /healthz  -> 200  WWW-Authenticate: -
		GET  /readyz   -> 200
	`+closed)
}

// With public_read GET and HEAD of blobs need no token. Folders do. Wrong credentials are refused.
func TestPublicRead(t *testing.T) {
	script(t, `
		serve  auth_token=sekret  read_token=reader  public_read=true
		PUT  /blob/k    Authorization: Bearer sekret  v  -> 201
		PUT  /blob/a/b  Authorization: Bearer sekret  v  -> 201
		PUT  /blob/c/   Authorization: Bearer sekret  v  -> 201
		GET  /blob/k     -> 200  v
		HEAD /blob/k     -> 200
		GET  /blob/c/    -> 200  v
		GET  /blob/none  -> 404  ~no blob under this key
		GET  /healthz    -> 200
		# credentials
		GET  /blob/k  Authorization: Bearer wrong      -> 401  unauthorized
		GET  /blob/k?expires=1&sig=00                  -> 401  unauthorized
		GET  /blob/k  Authorization: Bearer reader     -> 200  v
		PUT  /blob/k  Authorization: Bearer reader  v  -> 403
		# folders
		GET  /blob/    Accept: text/html  -> 401
		GET  /blob/a/  Accept: text/html  -> 401
		HEAD /blob/a/  Accept: text/html  -> 401
		GET  /blob/    Accept: text/html  Authorization: Bearer reader  -> 200
		GET  /blob/a/  Accept: text/html  Authorization: Bearer reader  -> 200
	`+closed)
}

// The token opens every route. A wrong one does not. A token is not logged.
func TestTokens(t *testing.T) {
	script(t, `
		serve  auth_token=sekret  log_level=debug
		PUT    /blob/k   Authorization: Bearer sekret  v              -> 201
		POST   /blob/k   Authorization: Bearer sekret  v              -> 201
		GET    /blob/k   Authorization: Bearer sekret                 -> 200
		DELETE /blob/x   Authorization: Bearer sekret                 -> 204
		GET    /blob/    Authorization: BEARER sekret                 -> 200
		GET    /         Authorization: Bearer sekret                 -> 200
		GET    /metrics  Authorization: Bearer sekret                 -> 200
		GET    /nothing  Authorization: Bearer sekret                 -> 404
		# as a password
		GET    /blob/    Authorization: Basic {base64 x:sekret}       -> 200
		GET    /metrics  Authorization: Basic {base64 :sekret}        -> 200
		PUT    /blob/k   Authorization: Basic {base64 a b:sekret}  v  -> 201
		# wrong
		GET    /blob/k   Authorization: Bearer wrong                  -> 401  unauthorized
		GET    /blob/k   Authorization: Bearer sekretx                -> 401  unauthorized
		GET    /blob/k   Authorization: Bearer sekre                  -> 401  unauthorized
		GET    /blob/k   Authorization: Bearer                        -> 401  unauthorized
		GET    /blob/k   Authorization: sekret                        -> 401  unauthorized
		GET    /blob/k   Authorization: Digest sekret                 -> 401  unauthorized
		GET    /blob/k   Authorization: Basic sekret                  -> 401  unauthorized
		GET    /blob/k   Authorization: Basic {base64 sekret:}        -> 401  unauthorized
		GET    /blob/k   Authorization: Basic {base64 x:wrong}        -> 401  unauthorized
		GET    /healthz  Authorization: Bearer wrong                  -> 200
		GET    /readyz   Authorization: Bearer wrong                  -> 200
		stop
		log path=/nothing status=404  -> 1
		log sekret                    -> 0
	`)
}

// The read token opens GET and HEAD of every route.
func TestReadToken(t *testing.T) {
	script(t, `
		serve  auth_token=sekret  read_token=reader  log_level=debug
		PUT    /blob/k   Authorization: Bearer sekret  v           -> 201
		GET    /blob/k   Authorization: Bearer reader              -> 200  v
		HEAD   /blob/k   Authorization: Bearer reader              -> 200
		GET    /blob/k   Authorization: Basic {base64 x:reader}    -> 200  v
		GET    /blob/?prefix=a  Authorization: Bearer reader       -> 200
		GET    /metrics  Authorization: Bearer reader              -> 200
		GET    /healthz  Authorization: Bearer reader              -> 200
		# writes
		PUT    /blob/k   Authorization: Bearer reader  v           -> 403  WWW-Authenticate: -
		POST   /blob/k   Authorization: Bearer reader  v           -> 403  ~GET and HEAD only
		DELETE /blob/k   Authorization: Basic {base64 x:reader}    -> 403
		PATCH  /blob/k   Authorization: Bearer reader              -> 403
		PUT    /blob/    Authorization: Bearer reader  v           -> 403
		stop
		log reader  -> 0
	`)
}

// A signature opens one method of one key until it expires. It is not logged.
func TestSignatures(t *testing.T) {
	script(t, `
		clock  1970-01-01T00:01:40.678Z
		serve  auth_token=sekret  read_token=reader  log_level=debug
		PUT    /blob/k?expires=110&sig={sign sekret PUT k 110}  v        -> 201
		POST   /blob/a/b?expires=110&sig={sign sekret POST a/b 110}  v   -> 201
		GET    /blob/k?expires=110&sig={sign sekret GET k 110}           -> 200  v
		GET    /blob/a/b?expires=110&sig={sign sekret GET a/b 110}       -> 200  v
		HEAD   /blob/k?expires=110&sig={sign sekret GET k 110}           -> 200
		HEAD   /blob/k?expires=110&sig={sign sekret HEAD k 110}          -> 200
		DELETE /blob/x?expires=110&sig={sign sekret DELETE x 110}        -> 204
		# for another method
		GET    /blob/k?expires=110&sig={sign sekret HEAD k 110}          -> 401  ~for another method
		GET    /blob/k?expires=110&sig={sign sekret PUT k 110}           -> 401  ~for another method
		PUT    /blob/k?expires=110&sig={sign sekret GET k 110}  v        -> 401  ~for another method
		POST   /blob/k?expires=110&sig={sign sekret PUT k 110}  v        -> 401  ~for another method
		DELETE /blob/k?expires=110&sig={sign sekret GET k 110}           -> 401  ~for another method
		PATCH  /blob/k?expires=110&sig={sign sekret GET k 110}           -> 401  ~for another method
		# expired
		GET    /blob/k?expires=101&sig={sign sekret GET k 101}           -> 200
		GET    /blob/k?expires=100&sig={sign sekret GET k 100}           -> 401  ~has expired
		clock  +322ms
		GET    /blob/k?expires=101&sig={sign sekret GET k 101}           -> 401  ~has expired
		GET    /blob/k?expires=soon&sig={sign sekret GET k soon}         -> 401  unauthorized
		# not for this URL, or wrong
		GET    /blob/k?expires=110&sig={sign sekret GET a/b 110}         -> 401  unauthorized
		GET    /blob/k?expires=1100&sig={sign sekret GET k 110}          -> 401  unauthorized
		GET    /blob/k?expires=110&sig={sign sekret GET k 110}0          -> 401  unauthorized
		GET    /blob/k?expires=110&sig={sign reader GET k 110}           -> 401  unauthorized
		GET    /blob/k?expires=110&sig={sign sekret GET k 110}&v=1       -> 401  unauthorized
		PUT    /blob/k?expires=110&sig={sign sekret PUT k 110}&ttl=1h    -> 401  unauthorized
		GET    /blob/?expires=110&sig={sign sekret GET {repeat 0 k} 110}  -> 401  unauthorized
		GET    /blob/k?sig=                                              -> 401  unauthorized
		GET    /blob/k?sig=00&sig=11                                     -> 401  unauthorized
		# beside a token
		GET    /blob/k?expires=110&sig={sign sekret GET k 110}  Authorization: Bearer sekret  -> 200
		GET    /blob/k?expires=110&sig={sign sekret GET k 110}  Authorization: Bearer wrong   -> 401
		GET    /blob/k?expires=100&sig={sign sekret GET k 100}  Authorization: Bearer sekret  -> 401
		GET    /blob/?sig=00                                    Authorization: Bearer sekret  -> 401
		PUT    /blob/k?expires=110&sig={sign sekret PUT k 110}  Authorization: Bearer reader  -> 201
		stop
		log sig=     -> 0
		log expires  -> 0
	`)
}

// sign returns the path that the command sign prints. It wants the path to expire in a minute, and
// the command to print this note, "" for none.
func (s *testServer) sign(method, key, note string) string {
	s.t.Helper()
	start := time.Now().Unix()
	environ := []string{"BLOBNOM_AUTH_TOKEN=sekret"}
	code, path, notes := runCommand(s.t, environ, "sign", "-method", method, "-ttl", "60", key)
	isNoted := strings.Contains(notes, note) && (notes == "") == (note == "")
	expect(s.t, code == 0 && isNoted, "%q: code %d, note %q, want %q", key, code, notes, note)
	_, query, _ := strings.Cut(path, "?expires=")
	var expires int64
	fmt.Sscan(strings.Replace(query, "&", " ", 1), &expires)
	isMinute := expires >= start+60 && expires <= time.Now().Unix()+60
	expect(s.t, isMinute, "%s is to expire at %d", path, start+60)
	return strings.TrimSuffix(path, "\n")
}

// The path that sign prints serves its method, for every key.
func TestSign(t *testing.T) {
	s := newTestServer(t, func(c *config) { c.AuthToken = "sekret" })
	t.Chdir(t.TempDir())
	for _, row := range []struct{ key, note string }{
		{"k", ""},
		{"a//b", ""},
		{"/", ""},
		{"a/", ""},
		{"a b", ""},
		{"ä/日本", ""},
		{"%2F", ""},
		{"a?b#c&d=e+f", ""},
		{"\x01\x7f", ""},
		{".../..a", ""},
		{".", "get 401"},
		{"../x", "get 401"},
		{"a/./b", "get 401"},
		{"/blob/k", `did you mean "k"?`},
	} {
		put := s.sign("PUT", row.key, row.note)
		s.want(201, "PUT", put, []byte(row.key))
		get := s.sign("GET", row.key, row.note)
		_, content := s.want(200, "GET", get, nil)
		expect(t, string(content) == row.key, "%q: %q", row.key, content)
		s.want(401, "DELETE", get, nil)
		s.want(401, "DELETE", put, nil)
	}
	path := s.sign("GET", "2026/cat.jpg", "")
	expect(t, strings.HasPrefix(path, "/blob/2026/cat.jpg?"), "%s escapes too much", path)
}

// A page of cors_origin may do what its browser asks for, on any path. Without cors_origin no page
// may.
func TestCORS(t *testing.T) {
	s := script(t, `
		serve
		OPTIONS /blob/k  Access-Control-Request-Method: PUT  -> 204  Access-Control-Allow-Origin: -
		stop
		serve  auth_token=sekret  public_read=true  cors_origin=https://example.org
		GET /blob/none  -> 404  Access-Control-Allow-Origin: https://example.org
		GET /metrics    -> 401  Access-Control-Allow-Origin: https://example.org
	`)
	const paths = "/ /blob/ /blob/k /blob/a//b /blob/../x /healthz /metrics /nothing/at/all"
	for _, path := range strings.Fields(paths) {
		row := strings.NewReplacer("PATH", path, "ASKS", "Access-Control-Request-Method: PUT",
			"HEADERS", "Access-Control-Request-Headers", "ALLOW", "Access-Control-Allow")
		s.script(row.Replace(`
			OPTIONS PATH  ASKS  -> 204  ALLOW-Origin: https://example.org
			OPTIONS PATH  ASKS  -> 204  ALLOW-Methods: GET, HEAD, PUT, POST, DELETE
			OPTIONS PATH  ASKS  HEADERS: if-match,x-any       -> 204  ALLOW-Headers: if-match,x-any
		`))
	}
}

// A page of cors_origin may read whatever header the server sends.
func TestExposedHeaders(t *testing.T) {
	s := script(t, `
		serve  cors_origin=https://example.org
		PUT /blob/k?ttl=7d  v
	`)
	resp, _ := s.want(200, "GET", "/blob/k", nil)
	exposed := strings.Split(resp.Header.Get("Access-Control-Expose-Headers"), ", ")
	const others = "Allow Cache-Control Content-Encoding Content-Range Retry-After Vary " +
		"WWW-Authenticate"
	names := slices.Collect(maps.Keys(resp.Header))
	for _, name := range append(names, strings.Fields(others)...) {
		isCORS := strings.HasPrefix(name, "Access-Control-")
		expect(t, isCORS || slices.Contains(exposed, name), "%s is not exposed", name)
	}
}

// A balancer asks with OPTIONS whether the server lives. It has no token.
func TestOptions(t *testing.T) {
	s := newTestServer(t, func(c *config) { c.AuthToken = "sekret" })
	s.script(`
		OPTIONS /            -> 204  Allow: GET, HEAD
		OPTIONS /healthz     -> 204  Allow: GET, HEAD
		OPTIONS /readyz      -> 204  Allow: GET, HEAD
		OPTIONS /metrics     -> 204  Allow: GET, HEAD
		OPTIONS /blob        -> 204  Allow: GET, HEAD
		OPTIONS /blob/k      -> 204  Allow: GET, HEAD, PUT, POST, DELETE
		OPTIONS /blob/a/../  -> 204  Allow: GET, HEAD, PUT, POST, DELETE
		OPTIONS /blob/k   Authorization: Bearer wrong  -> 401
		OPTIONS /healthz  Authorization: Bearer wrong  -> 204
		OPTIONS /nothing     -> 204  Allow: GET, HEAD
		OPTIONS /blob/k  Origin: https://evil.example  Sec-Fetch-Site: cross-site  -> 204
	`)
}

// connection is a connection of its own, over which a script sends bytes.
type connection struct {
	net.Conn
	opened time.Time
	taken  bytes.Buffer  // what "take" has read
	in     *bufio.Reader // what was taken, and the rest
}

// connection returns the connection of a name. The first use opens it.
func (s *testServer) connection(name string) *connection {
	s.t.Helper()
	c := s.connections[name]
	if c != nil {
		return c
	}
	_, address, _ := strings.Cut(s.base, "//")
	transport := s.client.Transport.(*http.Transport)
	conn, err := transport.DialContext(s.t.Context(), "tcp", address)
	fatal(s.t, err)
	s.t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(s.client.Timeout))
	c = &connection{Conn: conn, opened: time.Now()}
	c.in = bufio.NewReader(io.MultiReader(&c.taken, conn))
	if s.connections == nil {
		s.connections = map[string]*connection{}
	}
	s.connections[name] = c
	return c
}

var requestLine = regexp.MustCompile(`^[A-Z]+ /`)

// send sends bytes, "send NAME  BYTES", or a request as it stands there, without adding a length or
// more of the body: "send NAME  PUT /path  Header: value  BODY". In its body, \n ends a line.
func (s *testServer) send(fields []string) answer {
	s.t.Helper()
	c := s.connection(fields[0])
	text := fields[1]
	if requestLine.MatchString(text) {
		text += " HTTP/1.1\r\nHost: x\r\n"
		body := ""
		for _, field := range fields[2:] {
			if headerField.MatchString(field) {
				text += field + "\r\n"
			} else {
				body = strings.ReplaceAll(field, `\n`, "\r\n")
			}
		}
		text += "\r\n" + body
	}
	io.WriteString(c, text) // an error shows in the answer
	return answer{}
}

// take reads so many bytes of an answer, and no more: "take NAME  1000".
func (s *testServer) take(fields []string) answer {
	c := s.connection(fields[0])
	count := int64(byteCount(fields[1]))
	_, err := io.CopyN(&c.taken, c.Conn, count)
	return answer{text: fmt.Sprint(err), isError: err != nil}
}

// readAnswer reads the next answer of a connection: "answer NAME -> 201".
func (s *testServer) readAnswer(fields []string) answer {
	resp, err := http.ReadResponse(s.connection(fields[0]).in, nil)
	if err != nil {
		return answer{status: "none", text: err.Error(), isError: true}
	}
	text, err := io.ReadAll(resp.Body)
	status := strconv.Itoa(resp.StatusCode)
	return answer{status: status, header: resp.Header, text: string(text), isCut: err != nil}
}

// readEnd reads until the server closes a connection. It answers how long after its opening that
// is, and what came before: "ends NAME -> 1m0s  TEXT".
func (s *testServer) readEnd(fields []string) answer {
	c := s.connection(fields[0])
	text, err := io.ReadAll(c.in)
	took := time.Since(c.opened).String()
	return answer{status: took, text: string(text), isError: err != nil}
}

// metric answers a sample of the metrics, "-" if it is not there: "metric NAME -> VALUE". With two
// bounds the value has to be from the one to the other: "metric NAME  1 to 1000".
func (s *testServer) metric(fields []string) answer {
	s.t.Helper()
	value, isThere := s.metrics()[fields[0]]
	if !isThere {
		return answer{status: "-", isError: true}
	}
	result := answer{status: strconv.FormatFloat(value, 'f', -1, 64)}
	if len(fields) == 2 {
		var from, to float64
		fmt.Sscanf(fields[1], "%g to %g", &from, &to)
		result.isError = value < from || value > to
	}
	return result
}

// A page of another origin may not write, unless it is of cors_origin.
func TestForeignPages(t *testing.T) {
	for _, origin := range []string{"", "https://example.org"} {
		script(t, "serve  cors_origin="+origin+`
			PUT    /blob/k  Origin: https://evil.example                              x  -> 403
			PUT    /blob/k  Origin: https://evil.example  Sec-Fetch-Site: cross-site  x  -> 403
			PUT    /blob/k  Origin: https://evil.example  Sec-Fetch-Site: same-site   x  -> 403
			PUT    /blob/k  Origin: null                                              x  -> 403
			POST   /blob/k  Origin: https://evil.example                              x  -> 403
			DELETE /blob/k  Origin: https://evil.example                                 -> 403
			PUT    /blob/k                                                            v  -> 201
			GET    /blob/k  Origin: https://evil.example  Sec-Fetch-Site: cross-site     -> 200
			# The page of the server itself says so only where the connection is secure.
			PUT    /blob/k  Origin: https://blob.example  Sec-Fetch-Site: same-origin  v  -> 201
			send   own  PUT /blob/k  Origin: http://x  Content-Length: 1  v
			answer own  -> 201
		`)
	}
	for _, origin := range []string{"*", "https://evil.example"} {
		script(t, "serve  cors_origin="+origin+`
			PUT    /blob/k  Origin: https://evil.example                              x  -> 201
			PUT    /blob/k  Origin: https://evil.example  Sec-Fetch-Site: cross-site  x  -> 201
			POST   /blob/k  Origin: https://evil.example  Sec-Fetch-Site: same-site   x  -> 201
			DELETE /blob/k  Origin: https://evil.example  Sec-Fetch-Site: cross-site     -> 204
		`)
	}
}

// A query has what its route knows, once. Only reads of a blob ignore the rest.
func TestQueries(t *testing.T) {
	script(t, `
		serve
		PUT     /blob/k  v  -> 201
		PUT     /blob/k?tttl=5s          x  -> 400  ~known here, each once, are: ttl, expires, sig; refused: tttl
		POST    /blob/k?ttl=5s&tttl=5s   x  -> 400  ~refused: tttl
		PUT     /blob/k?ttl=5s&ttl=6s    x  -> 400  ~refused: ttl
		PUT     /blob/k?ttl=5s&x         x  -> 400  ~refused: x
		PUT     /blob/k?%zz              x  -> 400  bad request: the query is malformed
		PUT     /blob/k?ttl=5s&expires=1  x  -> 400  ~there is no sig
		DELETE  /blob/k?prefix=a            -> 400  ~known here, each once, are: expires, sig; refused: prefix
		DELETE  /blob/k?expires=1           -> 400  ~there is no sig
		GET     /blob/k?v=2                 -> 200  v  Blob-Version: 0
		GET     /blob/k?v=2&v=3&ttl=5s&%zz  -> 200  v
		GET     /blob/k?expires=1           -> 200  v
		GET     /blob/none?v=2              -> 404
		GET     /blob/k?sig=00&expires=1    -> 200  v
		GET     /blob/k?sig=00&v=2          -> 400  ~refused: v
		HEAD    /blob/k?sig=00&sig=00       -> 400
		GET     /blob/?prefx=a              -> 400  ~refused: prefx
		GET     /blob/?prefix=a&prefix=a    -> 400  ~refused: prefix
		GET     /?x                         -> 400  ~known here, each once, are: none; refused: x
		GET     /healthz?x=1                -> 400
		GET     /nothing?x                  -> 404
		# The server had a token when these were signed.
		PUT     /blob/k?ttl=5s&expires=1&sig=00  x  -> 201
		DELETE  /blob/k?expires=1&sig=00            -> 204
	`)
}

// An error does not repeat what may be a secret: it names a parameter only if that is a word.
func TestSecretQueries(t *testing.T) {
	script(t, `
		serve
		PUT     /blob/k?expires%3D1%26sig%3D00  x   -> 400  ~ttl, expires, sig; refused: another
		DELETE  /blob/k?{repeat 5 secret-}          -> 400  !secret-
		DELETE  /blob/k?{repeat 32 5e}              -> 400  !5e
		DELETE  /blob/k?{repeat 32 ee}              -> 400  !ee
		DELETE  /blob/k?{repeat 32 5e}=1            -> 400  !5e
		DELETE  /blob/k?x={repeat 32 5e}            -> 400  !5e
		DELETE  /blob/k?sig={repeat 32 5e}&x=1      -> 400  !5e
		DELETE  /blob/k?sig={repeat 32 5e};x        -> 400  !5e
	`)
}

// No cache keeps a blob longer than the blob lives, nor what a signature opened.
func TestCacheControl(t *testing.T) {
	const expires = "1767323055" // ten seconds after the clock's time
	signed := "/blob/k?expires=" + expires + "&sig=" + sign("sekret", "GET", "k", expires)
	for _, row := range []struct{ configured, young, old string }{ // with 100 s to live, with 2 s
		{"", "-", "-"},
		{"no-cache", "no-cache", "no-cache"},
		{"max-age=60", "max-age=60", "max-age=2"},
		{"S-MAXAGE=101, max-age=9", "S-MAXAGE=100, max-age=9", "S-MAXAGE=2, max-age=2"},
		{`private,max-age="99999999999999999999"`, "private,max-age=100", "private,max-age=2"},
	} {
		kept := cmp.Or(row.configured, "-")
		script(t, strings.NewReplacer("CONFIGURED", row.configured, "KEPT", kept,
			"YOUNG", row.young, "OLD", row.old, "SIGNED", signed).Replace(`
			clock 2026-01-02T03:04:05Z
			serve  cache_control=CONFIGURED  auth_token=sekret  public_read=true
			PUT   /blob/for-ever     Authorization: Bearer sekret  v  -> 201
			PUT   /blob/k?ttl=100s   Authorization: Bearer sekret  v  -> 201
			GET   /blob/for-ever                   -> 200  Cache-Control: KEPT
			GET   /blob/k                          -> 200  Cache-Control: YOUNG
			GET   /blob/none                       -> 404  Cache-Control: -
			GET   /blob/k  If-Match: "x"           -> 412  Cache-Control: -
			GET   SIGNED                           -> 200  Cache-Control: private, no-store
			clock +98s
			GET   /blob/k                          -> 200  Cache-Control: OLD
			HEAD  /blob/k                          -> 200  Cache-Control: OLD
			GET   /blob/k  Range: bytes=0-0        -> 206  Cache-Control: OLD
			GET   /blob/k  If-None-Match: *        -> 304  Cache-Control: OLD
		`))
	}
}

// A line of the debug log has the cause of a refusal and the bytes, but no secret.
func TestRequestLog(t *testing.T) {
	script(t, `
		serve  log_level=debug
		PUT /blob/k                          12345  -> 201
		GET /blob/k  Range: bytes=0-1               -> 206
		PUT /blob/k?sig=5e1f                 x      -> 201
		PUT /blob/k?ttl=5e1f                 x      -> 400
		PUT /blob/k?x=5e1f                   x      -> 400
		GET /blob/k  Authorization: Bearer 5e1f     -> 200
		GET /blob/k  If-Match: "x"                  -> 412
		stop
		log method=PUT path=/blob/k status=201 bytes_in=5 bytes_out=0 duration_ms=  -> 1
		log method=GET path=/blob/k status=206 bytes_in=0 bytes_out=2 duration_ms=  -> 1
		log error="bad request: ttl must be            -> 1  ~status=400
		log error="precondition failed: If-Match       -> 1  ~status=412
		log 5e1f                                       -> 0
	`)
}

// The type of an extension is the same on every machine.
func TestTypeByExtension(t *testing.T) {
	for _, row := range []struct{ keys, want string }{
		{"a.txt a.log a.TXT a.b/c.d.txt", "text/plain; charset=utf-8"},
		{"a.json", "application/json"},
		{"a.tar.gz", "application/gzip"},
		{".png x.gz/a.PNG", "image/png"},
		{"jpg a. a.png. a.jpg/b a.nosuchextension", octetStream},
	} {
		for _, key := range strings.Fields(row.keys) {
			got := typeByExtension(key)
			expect(t, got == row.want, "%s: %s, want %s", key, got, row.want)
		}
	}
	extensions := 0
	for row := range strings.SplitSeq(typeTable, ";") {
		extensions += len(strings.Fields(row)) - 1
	}
	different := len(typesByExtension)
	expect(t, extensions == different, "%d extensions, only %d differ", extensions, different)
}

// The type is that of the upload, else of the key's file extension.
func TestContentType(t *testing.T) {
	script(t, `
		serve
		PUT   /blob/a.jpg   Content-Type: text/x                                    x  -> 201
		GET   /blob/a.jpg   -> 200  Content-Type: text/x
		PUT   /blob/a.jpg   Content-Type: application/octet-stream                  x  -> 201
		GET   /blob/a.jpg   -> 200  Content-Type: application/octet-stream
		PUT   /blob/a.jpg                                                           x  -> 201
		GET   /blob/a.jpg   -> 200  Content-Type: image/jpeg
		GET   /blob/a.jpg   Range: bytes=0-0  -> 206  Content-Type: image/jpeg
		# Many clients send this type for any file.
		PUT   /blob/a.html  Content-Type: application/x-www-form-urlencoded         x  -> 201
		GET   /blob/a.html  -> 200  Content-Type: text/html; charset=utf-8
		PUT   /blob/a.css   Content-Type: Application/x-www-form-urlencoded; charset=x  x  -> 201
		GET   /blob/a.css   -> 200  Content-Type: text/css; charset=utf-8
		PUT   /blob/a.none  Content-Type: application/x-www-form-urlencoded         x  -> 201
		GET   /blob/a.none  -> 200  Content-Type: application/octet-stream
		# A form is not a file.
		POST  /blob/form    Content-Type: multipart/form-data              --x  -> 400  ~curl -T
		POST  /blob/form    Content-Type: Multipart/Form-Data; boundary=x  --x  -> 400  ~curl -T
		GET   /blob/form    -> 404
	`)
}

// A clock that goes back makes no Last-Modified that is in the future.
func TestLastModified(t *testing.T) {
	script(t, `
		clock 2026-01-02T03:04:05Z
		serve
		PUT   /blob/k  v  -> 201
		clock -1h
		GET   /blob/k                    -> 200  Last-Modified: Fri, 02 Jan 2026 02:04:05 GMT
		GET   /blob/k  Range: bytes=0-0  -> 206  Last-Modified: Fri, 02 Jan 2026 02:04:05 GMT
		GET   /blob/k  If-Modified-Since: Fri, 02 Jan 2026 02:04:05 GMT  -> 304
	`)
}

// A condition that fails is answered before the body is sent, and decided again at the commit.
func TestEarlyCondition(t *testing.T) {
	script(t, `
		serve   async_write=true
		PUT     /blob/k  v  -> 202
		send    early  PUT /blob/k  If-None-Match: *  Content-Length: 50000000
		answer  early  -> 412
		send    waits  PUT /blob/k  If-None-Match: *  Content-Length: 50000000  Expect: 100-continue
		answer  waits  -> 412
		# A client that reads nothing before it has sent the whole body gets its answer, too.
		send    a  PUT /blob/k  If-None-Match: *             Content-Length: 20000000
		send    a  {repeat 20000000 x}
		answer  a  -> 412
		send    b  PUT /blob/k  Origin: http://evil.example  Content-Length: 20000000
		send    b  {repeat 20000000 x}
		answer  b  -> 403
		send    c  PUT /blob/k  Content-Encoding: gzip       Content-Length: 20000000
		send    c  {repeat 20000000 x}
		answer  c  -> 400
		# Another client creates the key between the 100, which ends the first look, and the body.
		send    late  PUT /blob/late  If-None-Match: *  Content-Length: 1  Expect: 100-continue
		answer  late  -> 100
		PUT     /blob/late  other  -> 202
		send    late  x
		answer  late  -> 412
		GET     /blob/late  -> 200  other
	`)
}

// newPair writes a new certificate and its key: "pair NAME" makes NAME.pem and NAME.key.
func (s *testServer) newPair(fields []string) answer {
	s.t.Helper()
	private := noErr(ecdsa.GenerateKey(elliptic.P256(), crand.Reader))
	template := &x509.Certificate{
		SerialNumber:          big.NewInt(rand.Int64()),
		NotAfter:              time.Now().Add(time.Hour),
		IPAddresses:           []net.IP{net.IPv4(127, 0, 0, 1)},
		IsCA:                  true,
		BasicConstraintsValid: true,
	}
	public := private.Public()
	certificate := noErr(x509.CreateCertificate(crand.Reader, template, template, public, private))
	key := noErr(x509.MarshalPKCS8PrivateKey(private))
	certificateText := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: certificate})
	keyText := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key})
	s.writeFile([]string{fields[0] + ".pem", string(certificateText)})
	s.writeFile([]string{fields[0] + ".key", string(keyText)})
	return answer{}
}

// trust makes the client trust only one certificate, speak only HTTP/1 or only HTTP/2, and connect
// anew for each request: "trust FILE  HTTP/2".
func (s *testServer) trust(fields []string) answer {
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(noErr(os.ReadFile(s.path(fields[0]))))
	protocols := new(http.Protocols)
	protocols.SetHTTP1(fields[1] == "HTTP/1")
	protocols.SetHTTP2(fields[1] == "HTTP/2")
	s.client = &http.Client{Transport: &http.Transport{
		TLSClientConfig:   &tls.Config{RootCAs: roots},
		Protocols:         protocols,
		DisableKeepAlives: true,
	}}
	return answer{}
}

// A new certificate is used at once. The last one stays in use while there is none.
func TestTLS(t *testing.T) {
	script(t, `
		pair    old
		pair    new
		copy    old.pem  cert.pem
		copy    old.key  cert.key
		serve   log_level=debug  tls_cert=./cert.pem  tls_key=./cert.key
		trust   old.pem  HTTP/2
		# There is no certificate before the first handshake.
		remove  cert.pem
		GET     /healthz           -> none
		wait    log level=DEBUG msg="http: TLS handshake error  -> 1  ~cert.pem: no such file
		log     level=WARN         -> 1  ~certificate cannot be read
		copy    old.pem  cert.pem
		PUT     /blob/k  {noise 3C}  -> 201
		GET     /blob/k            -> 200  {noise 3C}
		trust   old.pem  HTTP/1
		PUT     /blob/k  {noise 4C}  -> 201
		GET     /blob/k            -> 200  {noise 4C}
		# a file without a certificate, warned of once
		copy    old.key  cert.pem
		GET     /healthz           -> 200
		GET     /healthz           -> 200
		log     level=WARN         -> 2
		# another error, another warning
		remove  cert.pem
		GET     /healthz           -> 200
		log     level=WARN         -> 3
		# the new certificate
		copy    new.pem  cert.pem
		copy    new.key  cert.key
		GET     /healthz           -> none  ~certificate
		trust   new.pem  HTTP/1
		GET     /healthz           -> 200
		log     level=WARN         -> 3
	`)
}

var (
	typeLine   = regexp.MustCompile(`^# TYPE (\w+) (counter|gauge|histogram)\n$`)
	sampleLine = regexp.MustCompile(`^((\w+?)(?:_bucket|_sum|_count)?(?:\{.+\})?) (\S+)\n$`)
)

// metrics scrapes the server: sample to value. A sample comes once, and its metric has one type.
func (s *testServer) metrics() map[string]float64 {
	s.t.Helper()
	resp, body := s.want(200, "GET", "/metrics", nil)
	contentType := resp.Header.Get("Content-Type")
	expect(s.t, contentType == "text/plain; version=0.0.4; charset=utf-8", "type %q", contentType)
	samples := map[string]float64{}
	types := map[string]string{}
	for line := range strings.Lines(string(body)) {
		if m := typeLine.FindStringSubmatch(line); m != nil {
			isCounter := strings.HasSuffix(m[1], "_total")
			isRight := types[m[1]] == "" && isCounter == (m[2] == "counter")
			expect(s.t, isRight, "a second type, or not that of the name: %s", line)
			types[m[1]] = m[2]
		} else if !strings.HasPrefix(line, "# HELP ") {
			m := sampleLine.FindStringSubmatch(line)
			if m == nil || types[m[2]] == "" {
				s.t.Fatalf("not a sample, or without a type: %s", line)
			}
			_, isTwice := samples[m[1]]
			expect(s.t, !isTwice, "a second sample: %s", line)
			samples[m[1]] = noErr(strconv.ParseFloat(m[3], 64))
		}
	}
	return samples
}

// Requests are counted by route, method and status.
func TestMetrics(t *testing.T) {
	script(t, `
		serve   num_shards=2
		PUT     /blob/k  {noise 100}          -> 201
		PUT     /blob/k  {noise 40}           -> 201
		PUT     /blob/b  {noise 3C}           -> 201
		GET     /blob/b                       -> 200
		GET     /blob/unheard                 -> 404
		GET     /blob/../x                    -> 400
		PATCH   /blob/x                       -> 405
		UNHEARD /blob/x                       -> 405
		GET     /unheard/of                   -> 404
		GET     /blob/                        -> 200
		GET     /blob/  Accept: text/html     -> 200
		DELETE  /blob/b                       -> 204
		# Neither keys nor paths nor methods make new samples.
		GET     /metrics                      -> 200  !unheard  !UNHEARD
		metric  blobnom_http_requests_total{route="/blob/{key...}",method="PUT",code="201"}     -> 3
		metric  blobnom_http_requests_total{route="/blob/{key...}",method="GET",code="404"}     -> 1
		metric  blobnom_http_requests_total{route="/blob/{key...}",method="DELETE",code="204"}  -> 1
		metric  blobnom_http_requests_total{route="/blob/{key...}",method="other",code="405"}   -> 2
		metric  blobnom_http_requests_total{route="none",method="GET",code="400"}               -> 1
		metric  blobnom_http_requests_total{route="/blob/",method="GET",code="200"}             -> 2
		metric  blobnom_http_requests_total{route="/",method="GET",code="404"}                  -> 1
		metric  blobnom_http_request_duration_seconds_count{route="/blob/",method="GET"}        -> 2
		metric  blobnom_http_received_bytes_total           -> 786572
		metric  blobnom_http_sent_bytes_total               786432 to 2e6
		metric  blobnom_batch_operations_total              -> 6
		metric  blobnom_batches_total                       4 to 6
		metric  blobnom_commit_seconds_total                1e-6 to 100
		metric  blobnom_queue_bytes                         -> 0
		metric  blobnom_queue_operations{shard="0"}         -> 0
		metric  blobnom_failed_background_writes_total{shard="0"}  -> 0
		metric  blobnom_shard_ready{shard="1"}              -> 1
		metric  blobnom_shard_blobs{shard="0"}              -> 1
		metric  blobnom_shard_blobs{shard="1"}              -> 0
		metric  blobnom_shard_file_bytes{shard="1"}         1e4 to 1e7
		metric  blobnom_shard_wal_bytes{shard="1"}          1e4 to 1e7
	`)
}

// The metrics of the process have the names and units that all exporters use.
func TestProcessMetrics(t *testing.T) {
	s := script(t, `
		serve
		metric  blobnom_disk_free_bytes            1e6 to 1e18
		metric  process_start_time_seconds         1.7e9 to 9e9
		metric  process_cpu_seconds_total          1e-3 to 1e5
		metric  process_max_fds                    20 to 1e10
		metric  go_goroutines                      2 to 1e4
		metric  go_memstats_heap_alloc_bytes       1e5 to 1e11
		metric  go_memstats_sys_bytes              1e6 to 1e11
		GET     /metrics  -> 200  ~blobnom_build_info{version="  ~",goversion="go1
	`)
	if runtime.GOOS == "linux" {
		s.script(`
			metric  process_open_fds               3 to 1e4
			metric  process_resident_memory_bytes  1e6 to 1e11
		`)
	}
}

// Blobs are counted at most once a minute, and a count that fails spoils nothing else.
func TestBlobCount(t *testing.T) {
	bubble(t, `
		PUT     /blob/one      -> 201
		metric  blobnom_shard_blobs{shard="0"}  -> 1
		PUT     /blob/another  -> 201
		sleep   59s
		metric  blobnom_shard_blobs{shard="0"}  -> 1
		sleep   2s
		metric  blobnom_shard_blobs{shard="0"}  -> 2
		sql     data/shard_0.db  ALTER TABLE blobs RENAME TO away
		sleep   61s
		metric  blobnom_shard_blobs{shard="0"}  -> 2
		sql     data/shard_0.db  ALTER TABLE away RENAME TO blobs
		metric  blobnom_shard_blobs{shard="0"}  -> 2
	`)
}

// A duration counts in the buckets of its bound and of all larger ones.
func TestHistogram(t *testing.T) {
	m := newMetrics()
	r := &http.Request{Method: "GET", Pattern: "GET /x"}
	for _, text := range strings.Fields("0 100us 101us 3ms 5ms 15s 16s") {
		took, err := time.ParseDuration(text)
		fatal(t, err)
		m.observe(&response{status: 200}, r, took)
	}
	var got bytes.Buffer
	m.write(&got)
	for line := range strings.Lines(`
		_bucket{route="/x",method="GET",le="0.0001"} 2
		_bucket{route="/x",method="GET",le="0.00025"} 3
		_bucket{route="/x",method="GET",le="0.0025"} 3
		_bucket{route="/x",method="GET",le="0.005"} 5
		_bucket{route="/x",method="GET",le="10"} 5
		_bucket{route="/x",method="GET",le="15"} 6
		_bucket{route="/x",method="GET",le="+Inf"} 7
		_sum{route="/x",method="GET"} 31.008201
		_count{route="/x",method="GET"} 7
	`) {
		line = strings.TrimLeft(line, "\t")
		isThere := strings.Contains(got.String(), line)
		expect(t, isThere, "no line %s in\n%s", line, &got)
	}
}

// pipeListener is a listener in memory: its connections go by the fake clock of a bubble.
type pipeListener chan net.Conn

func (l pipeListener) Addr() net.Addr { return &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)} }

func (l pipeListener) Accept() (net.Conn, error) {
	conn, isOpen := <-l
	if !isOpen {
		return nil, net.ErrClosed
	}
	return conn, nil
}

func (l pipeListener) Close() error {
	close(l)
	return nil
}

func (l pipeListener) dial(context.Context, string, string) (net.Conn, error) {
	client, server := net.Pipe()
	l <- server
	return client, nil
}

// bubble runs a script in a bubble of fake time, with a server of one shard that is reached through
// memory. Only waiting for the clock takes time.
func bubble(t *testing.T, text string) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		listener := make(pipeListener)
		client := newClient(listener.dial)
		client.Timeout = time.Hour
		defer client.CloseIdleConnections()
		s := &testServer{t: t, dir: t.TempDir(), clock: &clock{}, client: client}
		cfg := testConfig(t, oneShard)
		cfg.DataDir = s.path("data")
		fatal(t, s.serveOn(listener, cfg))
		s.script(text)
	})
}

// sleep lets time pass in a bubble: "sleep 50s".
func (s *testServer) sleep(fields []string) answer {
	time.Sleep(noErr(time.ParseDuration(fields[0])))
	return answer{}
}

// pause keeps the first shard from committing for some time of a bubble: "pause 5m".
func (s *testServer) pause(fields []string) answer {
	time.AfterFunc(noErr(time.ParseDuration(fields[0])), gate(s.store.shards[0]))
	return answer{}
}

// trickle sends a byte over a connection each second until it is closed: "trickle NAME".
func (s *testServer) trickle(fields []string) answer {
	c := s.connection(fields[0])
	var sending sync.WaitGroup
	sending.Go(func() {
		var err error
		for err == nil {
			time.Sleep(time.Second)
			_, err = io.WriteString(c, "x")
		}
	})
	s.t.Cleanup(sending.Wait)
	return answer{}
}

// A client that sends nothing is cut off after a minute. A slow one is not.
func TestSlowUploads(t *testing.T) {
	bubble(t, `
		send    stalled  PUT /blob/stalled  Content-Length: 1000000  abc
		ends    stalled        -> 1m0s
		GET     /blob/stalled  -> 404
		send    slow  PUT /blob/slow  Content-Length: 3
		sleep   50s
		send    slow  a
		sleep   50s
		send    slow  b
		sleep   50s
		send    slow  c
		answer  slow           -> 201
		GET     /blob/slow     -> 200  abc
	`)
}

// The time that a commit takes is not the client's, neither in the middle of an upload nor at its
// end.
func TestSlowCommits(t *testing.T) {
	bubble(t, `
		# The first chunk waits for its commit, and the second is read.
		send    large  PUT /blob/large  Content-Length: 786432
		pause   5m
		send    large  {noise 3C 0:2C+1}
		sleep   5m50s
		send    large  {noise 3C 2C+1:3C}
		answer  large        -> 201
		GET     /blob/large  -> 200  {noise 3C}
		send    small  PUT /blob/small  Content-Length: 1
		pause   5m
		send    small  x
		answer  small        -> 201
	`)
}

// A download ends when its client takes nothing for two minutes. A slow one ends whole.
func TestSlowDownloads(t *testing.T) {
	bubble(t, `
		PUT     /blob/k  {noise 4C}  -> 201
		send    slow  GET /blob/k
		take    slow  200000
		sleep   110s
		take    slow  200000
		sleep   110s
		take    slow  200000
		sleep   110s
		answer  slow     -> 200  {noise 4C}
		# The content of a deleted blob is kept as long as it is being downloaded.
		send    stalled  GET /blob/k
		take    stalled  1000
		DELETE  /blob/k  -> 204
		sleep   119s
		sql     data  SELECT count(*) FROM chunks  -> 4
		sleep   10s
		sql     data  SELECT count(*) FROM chunks  -> 0
		metric  blobnom_http_requests_total{route="/blob/{key...}",method="GET",code="0"}  -> 1
	`)
}

// After a part of an answer nothing else follows on its connection.
func TestHalfAnAnswer(t *testing.T) {
	bubble(t, `
		PUT     /blob/small  {noise 1000}  -> 201
		PUT     /blob/large  {noise 2C}    -> 201
		send    a  GET /blob/small
		take    a  10
		send    b  GET /blob/large
		take    b  10
		sleep   121s
		send    a  GET /blob/small
		send    b  GET /blob/small
		ends    a  -> 2m1s  HTTP/1.1 2
		ends    b  -> 2m1s  HTTP/1.1 2
	`)
}

// A stop waits for requests that run, but not for ever.
func TestStopCutsOff(t *testing.T) {
	bubble(t, `
		PUT     /blob/k  {noise 4C}  -> 201
		send    down  GET /blob/k
		take    down  1000
		send    up  PUT /blob/up  Content-Length: 10  x
		sleep   1s
		stop
		ends    down  -> 16s
		ends    up    -> 16s
		log     requests cut off  -> 1
	`)
}

// An error is answered at once, whatever of the body has been sent. What is read afterwards has an
// end.
func TestEarlyErrors(t *testing.T) {
	for _, row := range []struct{ cause, status string }{
		{`If-Match: "x"`, "412"},
		{"Origin: http://evil.example", "403"},
		{"Content-Encoding: gzip", "400"},
	} {
		for _, body := range []struct{ what, sent, rest string }{
			{"nothing of a short body", "Content-Length: 1000", "10s"},
			{"a part of a short body", "Content-Length: 1000  x", "10s"},
			{"a part of a long body", "Content-Length: 300000  x", "10s"},
			{"nothing of a chunked body", "Transfer-Encoding: chunked", "10s"},
			{"a part of a chunked body", "Transfer-Encoding: chunked  ffff\\nx", "10s"},
			{"a body that waits", "Content-Length: 1000  Expect: 100-continue", "10s"},
			{"chunks that wait", "Transfer-Encoding: chunked  Expect: 100-continue", "10s"},
		} {
			bubble(t, fmt.Sprintf(`
				# %s
				send    it  PUT /blob/k  %s  %s
				answer  it       -> %s
				trickle it
				ends    it       -> %s
				GET     /blob/k  -> 404
			`, body.what, row.cause, body.sent, row.status, body.rest))
		}
	}
}

// An answer of net/http itself reaches its client, whatever the client still sends.
func TestRefusedHeader(t *testing.T) {
	script(t, `
		serve
		send    c  GET /healthz  X: {repeat 8C x}
		answer  c  -> 431
	`)
}

// A connection on which a write was refused is used again, if the body came.
func TestErrorKeepsConnection(t *testing.T) {
	script(t, `
		serve
		send    c  PUT /blob/k  If-Match: *  Content-Length: 3  abc
		answer  c  -> 412
		send    c  PUT /blob/k  If-Match: *  Content-Length: 3  abc
		answer  c  -> 412
		send    c  PUT /blob/k               Content-Length: 3  abc
		answer  c  -> 201
	`)
}

// The kernel asks for more of an answer in small steps: a slow client is seen to move on.
func TestListen(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("the option is Linux's")
	}
	listener, err := listen("127.0.0.1:0")
	fatal(t, err)
	defer listener.Close()
	client, err := net.Dial("tcp", listener.Addr().String())
	fatal(t, err)
	defer client.Close()
	conn, err := listener.Accept()
	fatal(t, err)
	defer conn.Close()
	raw, err := conn.(*net.TCPConn).SyscallConn()
	fatal(t, err)
	fatal(t, raw.Control(func(fd uintptr) {
		got, err := syscall.GetsockoptInt(int(fd), syscall.IPPROTO_TCP, notSentLowat)
		expect(t, err == nil && got == unsentBytes, "it is %d, %v, want %d", got, err, unsentBytes)
	}))
}

// A ttl is whole seconds, whole days, or a duration as Go writes it, of at most a hundred years.
func TestParseTTL(t *testing.T) {
	for _, row := range []struct{ texts, want string }{
		{"90 90s 1.5m", "1m30s"},
		{"250ms", "250ms"},
		{"7d 604800", "168h0m0s"},
		{"36500d 876000h 3153600000", "876000h0m0s"},
	} {
		for _, text := range strings.Fields(row.texts) {
			got, err := parseTTL(text)
			isRight := err == nil && got.String() == row.want
			expect(t, isRight, "%q: %v, %v, want %s", text, got, err, row.want)
		}
	}
	const refused = ",d,0,0d,-1,-1s,-1d,+1d,1.5,1.5d,1d12h,1e3,x,5 ," +
		"36501d,876000h1ns,3153600001,213504d,99999999999999999999,99999999999999999999d"
	for text := range strings.SplitSeq(refused, ",") {
		got, err := parseTTL(text)
		expect(t, err != nil && got == 0, "%q: %v, %v, want an error", text, got, err)
	}
}

// ============================================================================
// Store
// ============================================================================

// status sends one request and returns the status of the answer, 0 if there is none.
func (s *testServer) status(method, path string, body io.Reader, headers ...string) int {
	if resp, _, err := s.do(method, path, body, headers...); err == nil {
		return resp.StatusCode
	}
	return 0
}

func oneShard(c *config)     { c.NumShards = 1 }
func ms(n int) time.Duration { return time.Duration(n) * time.Millisecond }

// A key lies where every version of the program looks for it.
func TestPlacement(t *testing.T) {
	for _, row := range []struct {
		hash, key string
		want      uint64
	}{
		{"fnv1a", "hello", 0xa430d84680aabd0b},
		{"fnv1a", "", 0xcbf29ce484222325},
		{"crc32c", "123456789", 0xe3069283},
		{"sha256", "abc", 0xba7816bf8f01cfea},
	} {
		got := hashes[row.hash](row.key)
		expect(t, got == row.want, "%s(%q) = %x, want %x", row.hash, row.key, got, row.want)
	}
}

// What is put comes back, whatever the store is made of.
func TestStorage(t *testing.T) {
	sizes := strings.Fields("0 5C+7 1 C 4096 2C C-1 C+1") // large by small and back
	for _, settings := range []string{
		"num_shards=1  hash=fnv1a   durability=full",
		"num_shards=4  hash=crc32c  durability=normal",
		"num_shards=4  hash=sha256  durability=off     storage_compression=true",
		"num_shards=1  hash=crc32c  durability=full    storage_compression=true",
	} {
		s := script(t, "serve  "+settings)
		for _, size := range sizes {
			s.script(strings.ReplaceAll(`
				PUT  /blob/noise-SIZE  {noise SIZE}  -> 201
				PUT  /blob/prose-SIZE  Transfer-Encoding: chunked  {prose SIZE}  -> 201
				PUT  /blob/replaced  {noise SIZE}    -> 201
				GET  /blob/replaced  -> 200  {noise SIZE}
			`, "SIZE", size))
		}
		s.script("stop\nserve  " + settings)
		for _, size := range sizes {
			s.script(strings.ReplaceAll(`
				GET  /blob/noise-SIZE  -> 200  {noise SIZE}
				GET  /blob/prose-SIZE  -> 200  {prose SIZE}
			`, "SIZE", size))
		}
	}
}

// stoppedDir returns a directory of four shards, with the id "an-id" and a blob "k" on shard 2.
func stoppedDir(t *testing.T) string {
	return script(t, `
		# The marker of a creation that goes on has the record of the directory.
		write  data/blobnom.new  {"NumShards":4,"Hash":"fnv1a","Directory":"an-id"}
		serve
		PUT    /blob/k  v  -> 201
		stop
		remove data/blobnom.reserve
	`).path("data")
}

// A directory is refused if a shard is missing, or is another's.
func TestIncompleteDirectories(t *testing.T) {
	directory := stoppedDir(t)
	for _, row := range []struct{ spoil, refusal string }{
		{"remove data/shard_0.db", "shard_0.db is missing"},
		{"remove data/shard_3.db", "shard_3.db is missing"},
		{"copy data/shard_2.db  data/shard_1.db", "shard_1.db: it does not belong"},
		{"copy data/shard_1.db  data/shard_4.db", "shard_4.db: it does not belong"},
		{"UPDATE meta SET value = 'x' WHERE key = 'directory'", "shard_2.db: it does not belong"},
		{"UPDATE meta SET value = 3 WHERE key = 'num_shards'", "shard_2.db: it does not belong"},
		{"UPDATE meta SET value = 'sha256' WHERE key = 'hash'", "shard_2.db: it does not belong"},
	} {
		spoil := strings.Replace(row.spoil, "UPDATE", "sql data/shard_2.db  UPDATE", 1)
		const text = "copy %s  data\n%s\n# %[2]s\nserve  -> refused  ~%s  ~backup"
		script(t, fmt.Sprintf(text, directory, spoil, row.refusal))
	}
}

// A directory is served only if it fits the configuration and all its shards can be used.
func TestRefusedDirectories(t *testing.T) {
	scripts(t, "copy "+stoppedDir(t)+"  data", `
		# another configuration
		serve  num_shards=8  -> refused  ~holds 4 shards  ~num_shards = 8  ~blobnom migrate
		serve  num_shards=2  -> refused  ~holds 4 shards  ~num_shards = 2  ~blobnom migrate
		serve  hash=sha256   -> refused  ~placed by fnv1a  ~hash = "sha256"  ~blobnom migrate
		serve
		GET    /blob/k  -> 200  v

		# a newer schema
		sql    data/shard_1.db  PRAGMA user_version = 2
		serve  -> refused  ~shard_1.db  ~version 2  ~newer version

		# no shard that can be read
		write  data/shard_0.db  garbage
		write  data/shard_1.db  garbage
		write  data/shard_2.db  garbage
		write  data/shard_3.db  garbage
		serve  -> refused  ~no shard  ~backup

		# a file in its place
		remove data
		write  data  text
		serve  -> refused  ~cannot create the data directory

		# The Rust Blobnom's stays as it is.
		remove data
		write  data/notes.txt
		sql    data/shard_0.db  PRAGMA journal_mode = WAL
		sql    data/shard_0.db  CREATE TABLE blobs (key TEXT PRIMARY KEY, data BLOB)
		keep   data
		serve  -> refused  ~Rust Blobnom  ~another program  ~blobnom migrate
		same   data
		ls     data  -> 2  notes.txt shard_0.db

		# Files and tables of others beside ours are no problem.
		copy   data/shard_0.db  data/shard_x.db
		copy   data/shard_0.db  data/shard_01.db
		copy   data/shard_0.db  data/shard_0.db.new
		write  data/shard_7.db/file
		sql    data/shard_0.db  CREATE TABLE _litestream_seq (id INTEGER PRIMARY KEY)
		serve
		GET    /blob/k  -> 200  v
		stop
		remove data
	`)
}

// A start that was killed while it created the shards is completed as it was begun, whatever the
// configuration asks for now.
func TestCompletedCreation(t *testing.T) {
	script(t, "copy "+stoppedDir(t)+"  data\n"+`
		# It was killed before the third shard, and a power loss emptied the second one.
		write  data/blobnom.new  {"NumShards":4,"Hash":"fnv1a","Directory":"an-id"}
		remove data/shard_2.db  data/shard_3.db
		write  data/shard_1.db
		serve  num_shards=8  -> refused  ~holds 4 shards  ~num_shards = 8
		serve
		sql    data/shard_3.db  SELECT value FROM meta WHERE key = 'directory'  -> an-id
		PUT    /blob/k  v  -> 201
		stop
		ls     data  -> 6  blobnom.lock blobnom.reserve shard_0.db shard_1.db shard_2.db shard_3.db
		# A power loss brought the marker back, after writes.
		write  data/blobnom.new  {"NumShards":4,"Hash":"fnv1a","Directory":"an-id"}
		serve
		GET    /blob/k  -> 200  v
		stop
		ls     data  -> 6  !blobnom.new
	`)
	script(t, `
		# An older version wrote the id of the directory alone.
		write  data/blobnom.new  ABCDEFGHIJKLMNOPQRSTUVWXYZ
		serve
		sql    data/shard_3.db  SELECT value FROM meta WHERE key = 'directory'  -> ABCDEFGHIJKLMNOPQRSTUVWXYZ
	`)
}

// A start that is killed while it creates the shards leaves nothing to repair, and one server keeps
// others out until it dies.
func TestKilledCreation(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "data")
	const shards = "BLOBNOM_NUM_SHARDS=30"
	for round := range 5 {
		cmd := asBlobnom(t, exec.Command(os.Args[0]), dir, shards)
		fatal(t, cmd.Start())
		last := filepath.Join(dir, shardName(5*round+rand.IntN(5)))
		eventually(t, "a shard appears", func() bool { return fileExists(last) })
		cmd.Process.Kill()
		cmd.Wait()
	}
	p := startProgram(t, dir, shards)
	expect(t, !fileExists(filepath.Join(dir, creatingFile)), "the marker is left")
	p.put("k", []byte("v"))
	second := &testServer{t: t, dir: filepath.Dir(dir)}
	second.script(`blobnom serve  num_shards=30  -> 1  ~in use by another blobnom`)
	p.signal(os.Kill)
	p = startProgram(t, dir, shards) // the lock died with its owner
	p.wantBlob("k", []byte("v"))
	p.want(200, "GET", "/readyz", nil)
	fatal(t, p.signal(os.Interrupt))
	verifyDir(t, dir)
}

// A shard that is corrupt at the start fails alone. So do listings, which would lack its keys.
func TestCorruptShard(t *testing.T) {
	for _, spoil := range []string{
		"overwrite {shard sick}  0  garbage garbage garbage",
		"overwrite {shard sick}  40  {noise 60}",          // the application id
		"overwrite {shard sick}  4096  {repeat 200000 x}", // the tables
		"write {shard sick}",
	} {
		script(t, strings.ReplaceAll(`
			serve
			PUT     /blob/sick     {noise 9000}  -> 201
			PUT     /blob/healthy  {noise 9000}  -> 201
			stop
			SPOIL
			serve
			HEAD    /blob/sick                   -> 500
			GET     /blob/sick                   -> 500  shard is corrupt
			PUT     /blob/sick     new           -> 500  shard is corrupt
			DELETE  /blob/sick                   -> 500  shard is corrupt
			GET     /blob/                       -> 500  shard is corrupt
			GET     /blob/healthy                -> 200  {noise 9000}
			PUT     /blob/healthy  new           -> 201
			log     status=500                   -> 5
			metric  blobnom_shard_ready{shard="3"}  -> 0
			metric  blobnom_shard_ready{shard="2"}  -> 1
			metric  blobnom_shard_blobs{shard="3"}  -> -
			GET     /readyz  -> 503  !data  ~"ready":true,"shard":2}  ~{"error":"shard is corrupt","failed_background_writes":0,"ready":false,"shard":3}
			stop
			remove  data
		`, "SPOIL", spoil))
	}
}

// A file that was emptied is corrupt, too. Its WAL stays, because it may hold everything.
func TestEmptiedShard(t *testing.T) {
	script(t, `
		serve
		stop
		write   data/shard_3.db
		write   data/shard_3.db-wal  everything
		serve
		GET     /blob/sick  -> 500  shard is corrupt
		stop
		ls      data  -> 7  ~shard_3.db-wal
		remove  data
	`)
}

// Damage that is met later, by a read or a write, makes the shard unready until a restart.
func TestDamageMetLater(t *testing.T) {
	// The root of an index is none of a table. With another schema_version it is read again.
	const damage = "PRAGMA writable_schema = ON; PRAGMA schema_version = 100; " +
		"UPDATE sqlite_schema SET rootpage = " +
		"(SELECT rootpage FROM sqlite_schema WHERE name = 'expiring') WHERE name = "
	for _, row := range []struct{ damaged, action string }{
		{"chunks", "GET /blob/large"},
		{"blobs", "GET /blob/large"},
		{"blobs", "GET /blob/"},
		{"chunks", "PUT /blob/other  {noise 2C}"},
	} {
		bubble(t, fmt.Sprintf(`
			PUT     /blob/large  {noise 2C}  -> 201
			sql     data/shard_0.db  %s'%s'
			GET     /readyz  -> 200
			%s  -> 500  shard is corrupt
			sleep   5s
			GET     /readyz  -> 503  ~shard is corrupt
			stop
			remove  data
		`, damage, row.damaged, row.action))
	}
}

// ============================================================================
// Shard
// ============================================================================

// lock holds the lock of a shard as another process would: "lock FILE".
func (s *testServer) lock(fields []string) answer {
	s.t.Helper()
	db := openDB(s.path(fields[0]), busyPragma())
	s.other = hold(s.t, db, "BEGIN IMMEDIATE")
	return answer{}
}

func (s *testServer) unlock([]string) answer {
	s.t.Helper()
	fatal(s.t, s.other.Close())
	return answer{}
}

// asWriter runs f in place of o on the goroutine that writes to the first shard, inside a
// transaction.
func (s *testServer) asWriter(o *op, f func()) {
	s.t.Helper()
	o.urgent = true
	o.frees = true
	o.do = func(*tx) error {
		f()
		return errCondition
	}
	fatal(s.t, s.store.shards[0].batcher.add(o))
	<-o.done
}

// writer answers the value of SQL on the connection that writes to the first shard, as that is set
// for a write ("writer SQL") or for a chunk ("writer SQL  chunk").
func (s *testServer) writer(fields []string) answer {
	s.t.Helper()
	sh := s.store.shards[0]
	o := sh.deleteOp("k", conditions{})
	if len(fields) > 1 {
		o = sh.chunkOp(1, 0, nil)
	}
	var value sql.NullString
	s.asWriter(o, func() {
		err := sh.writer.QueryRow(fields[0]).Scan(&value)
		expect(s.t, err == nil || err == sql.ErrNoRows, "%s: %v", fields[0], err)
	})
	return answer{status: value.String}
}

// breakWriter makes system calls of the first shard's writer fail until the server stops:
// "break CALL CALL  ERRNO".
func (s *testServer) breakWriter(fields []string) answer {
	s.t.Helper()
	var err error
	s.asWriter(&op{}, func() { err = breakSystemCalls(fields) })
	if err != nil {
		skip(s.t, "cannot make system calls fail here: %v", err)
	}
	return answer{}
}

// open opens the store of one shard in data while system calls fail: "open CALL  ERRNO". Its answer
// has the error and the log.
func (s *testServer) open(fields []string) answer {
	s.t.Helper()
	cfg := testConfig(s.t, oneShard)
	cfg.DataDir = s.path("data")
	lock := noErr(lockDir(cfg.DataDir))
	log := slog.New(slog.NewTextHandler(s.log, nil))
	err := whileBroken(s.t, fields, func() error {
		_, err := openLocked(s.t.Context(), cfg, lock, log, time.Now)
		return err
	})
	return answer{status: "refused", text: fmt.Sprint(err, s.log), isError: true}
}

// mountDisk makes the script's directory a disk of its own: "mount SIZE".
func (s *testServer) mountDisk(fields []string) answer {
	s.t.Helper()
	s.dir = mount(s.t, fields[0])
	return answer{}
}

// fillDisk is another program that leaves so many bytes of that disk: "fill-disk LEFT". Its file
// is ./filler.
func (s *testServer) fillDisk(fields []string) answer {
	s.t.Helper()
	name := s.path("filler")
	err := os.WriteFile(name, make([]byte, 64<<20), 0o600)
	expect(s.t, err != nil, "the disk is larger than its filler")
	left := int64(byteCount(fields[0]))
	fatal(s.t, os.Truncate(name, sizeOf(name)-left))
	return answer{}
}

// each returns the lines that format makes of the numbers from first to last.
func each(first, last int, format string) string {
	var lines strings.Builder
	for i := first; i <= last; i++ {
		fmt.Fprintf(&lines, format+"\n", i)
	}
	return lines.String()
}

// gate keeps a shard's batcher busy until it is opened: what is added meanwhile forms one batch.
func gate(sh *shard) (open func()) {
	block := make(chan struct{})
	inside := make(chan struct{})
	sh.batcher.add(&op{do: func(*tx) error {
		close(inside)
		<-block
		return nil
	}})
	<-inside
	return func() { close(block) }
}

// systemCalls has the numbers of the calls that the fault tests make fail.
var systemCalls = map[string]map[string]uintptr{
	"linux/amd64": {
		"pread64": 17, "pwrite64": 18, "fsync": 74, "fdatasync": 75, "prctl": 157, "openat": 257,
	},
	"linux/arm64": {
		"pread64": 67, "pwrite64": 68, "fsync": 82, "fdatasync": 83, "prctl": 167, "openat": 56,
	},
}[runtime.GOOS+"/"+runtime.GOARCH]

var errnos = map[string]syscall.Errno{
	"EACCES": syscall.EACCES,
	"EDQUOT": syscall.EDQUOT,
	"EFBIG":  syscall.EFBIG,
	"EIO":    syscall.EIO,
	"ENOMEM": syscall.ENOMEM,
}

// breakSystemCalls makes system calls fail on the calling goroutine's thread: "CALL CALL", "ERRNO".
// The seccomp filter cannot be taken off again, so the goroutine keeps its thread, which ends with
// it.
func breakSystemCalls(fields []string) error {
	if systemCalls == nil {
		return errors.New("not known for " + runtime.GOOS + "/" + runtime.GOARCH)
	}
	type instruction struct {
		code   uint16
		jt, jf uint8
		k      uint32
	}
	const (
		load        = 0x20
		jumpIfEqual = 0x15
		answer      = 0x06
		allow       = 0x7fff0000
		fail        = 0x00050000
	)
	calls := strings.Fields(fields[0])
	program := []instruction{{code: load}}
	for i, call := range calls {
		skip := uint8(len(calls) - i)
		program = append(program, instruction{jumpIfEqual, skip, 0, uint32(systemCalls[call])})
	}
	program = append(program,
		instruction{code: answer, k: allow},
		instruction{code: answer, k: fail | uint32(errnos[fields[1]])})
	filter := struct {
		n     uint16
		first *instruction
	}{uint16(len(program)), &program[0]}
	const (
		noNewPrivileges = 38
		setSeccomp      = 22
		withFilter      = 2
	)
	runtime.LockOSThread()
	prctl := systemCalls["prctl"]
	syscall.RawSyscall6(prctl, noNewPrivileges, 1, 0, 0, 0, 0)
	_, _, failed := syscall.RawSyscall(prctl, setSeccomp, withFilter, uintptr(unsafe.Pointer(&filter)))
	if failed != 0 {
		return failed
	}
	return nil
}

// whileBroken runs f on a thread of its own, whose system calls fail, and returns its error.
func whileBroken(t testing.TB, fields []string, f func() error) error {
	t.Helper()
	broken := make(chan error, 1)
	result := make(chan error, 1)
	go func() {
		broken <- breakSystemCalls(fields)
		result <- f()
	}()
	if err := <-broken; err != nil {
		skip(t, "cannot make system calls fail here: %v", err)
	}
	return <-result
}

// A download that runs while its blob is replaced or deleted ends whole. What nobody reads is
// swept.
func TestReplacedWhileDownloaded(t *testing.T) {
	t.Parallel() // it waits for upkeep
	s := script(t, `
		serve  num_shards=1
		PUT    /blob/k  {noise 10C}
		GET    /blob/k                              -> 200  {noise 10C}
	`)
	sh := s.store.shards[0]
	first := noErr(sh.read("k", false))
	second := noErr(sh.read("k", false))
	s.script(`
		PUT    /blob/k  {noise 2C}                  -> 201
		DELETE /blob/k                              -> 204
		PUT    /blob/k  new                         -> 201
		# The content of two chunks goes, the content that is read stays.
		wait sql data  SELECT count(*) FROM chunks  -> 10
	`)
	first.close()
	expect(t, sh.isHeld(second.blob.id), "the end of one download ends the use of another")
	content, err := io.ReadAll(second)
	isWhole := err == nil && string(content) == expand("{noise 10C}")
	expect(t, isWhole, "a download of %d bytes, %v", len(content), err)
	second.close()
	s.script(`
		wait sql data  SELECT count(*) FROM chunks  -> 0
		GET    /blob/k                              -> 200  new
	`)
}

// An upload that breaks off leaves nothing visible, and its space comes back.
func TestAbortedUpload(t *testing.T) {
	t.Parallel() // it waits for upkeep
	s := script(t, `
		serve  num_shards=1
		PUT    /blob/k  old
	`)
	for name, request := range map[string]string{
		"of a known length": `PUT /blob/k  Content-Length: 10485760  {noise 20C}`,
		"chunked":           `PUT /blob/k  Transfer-Encoding: chunked  500000\n{noise 20C}`,
	} {
		s.script(`
			send ` + name + `  ` + request + `
			wait sql data  SELECT count(*) > 10 FROM chunks                 -> 1
		`)
		s.connection(name).Close()
		s.script(`
			wait sql data  SELECT count(*) FROM orphans                     -> 0
			wait sql data  SELECT count(*) FROM chunks                      -> 0
			wait sql data  SELECT page_count < 512 FROM pragma_page_count   -> 1
			GET  /blob/k                                                    -> 200  old
		`)
	}
}

// numbers begins a statement of SQL that uses the numbers up to 4999.
const numbers = `WITH RECURSIVE n (i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i < 4999)`

// Content ids begin above those of an earlier run, also those of orphans.
func TestContentIDs(t *testing.T) {
	script(t, `
		serve  num_shards=1
		stop
		# An earlier run left an orphan, which it takes a while to sweep.
		sql    data/shard_0.db  INSERT INTO orphans VALUES (1)
		sql    data/shard_0.db  `+numbers+` INSERT INTO chunks SELECT 1 << 20 | i, x'00' FROM n
		serve  num_shards=1
		PUT    /blob/k  {noise 2C} -> 201
		GET    /blob/k             -> 200  {noise 2C}
	`)
}

// In async mode a read sees every write that was answered before, and does not wait for the window
// of a batch.
func TestAsync(t *testing.T) {
	script(t, `
		serve  num_shards=2  async_write=true  batch_timeout_ms=60000
		PUT    /blob/k  {noise 10}   -> 202
		GET    /blob/k               -> 200  {noise 10}    Blob-Version: 0
		PUT    /blob/k  {noise 3C}   -> 202
		GET    /blob/k               -> 200  {noise 3C}    Blob-Version: 1
		PUT    /blob/k  ""           -> 202
		GET    /blob/k               -> 200  ""            Blob-Version: 2
		PUT    /blob/k  {noise C+1}  -> 202
		GET    /blob/k               -> 200  {noise C+1}   Blob-Version: 3
		PUT    /blob/k  again        -> 202
		HEAD   /blob/k               -> 200  Content-Length: 5
		DELETE /blob/k               -> 202
		GET    /blob/k               -> 404

		# Writes of one key are committed in their order.
		PUT    /blob/k  1            -> 202
		DELETE /blob/k               -> 202
		PUT    /blob/k  2            -> 202
		PUT    /blob/k  3            -> 202
		GET    /blob/k               -> 200  3             Blob-Version: 1

		# A stop commits what is queued.
		PUT    /blob/k  4            -> 202
		stop
		serve  num_shards=2
		GET    /blob/k               -> 200  4
	`)
}

// One operation that fails, after it wrote something, does so alone. The others of its batch are
// committed. A 202 that fails is logged and counted.
func TestBadOperationFailsAlone(t *testing.T) {
	script(t, `
		serve  num_shards=1  async_write=true  batch_timeout_ms=60000
		sql    data/shard_0.db  CREATE TRIGGER no AFTER INSERT ON blobs WHEN new.key = 'bad' BEGIN SELECT raise(FAIL, ''); END
		PUT    /blob/before  x  -> 202
		PUT    /blob/bad     x  -> 202
		PUT    /blob/after   x  -> 202
		GET    /blob/bad        -> 404
		GET    /blob/before     -> 200
		GET    /blob/after      -> 200
		log    msg="a write that was answered 202 failed" key=bad shard=0 -> 1
		GET    /metrics         -> 200  ~blobnom_failed_background_writes_total{shard="0"} 1
		sql    data/shard_0.db  DROP TRIGGER no
		PUT    /blob/bad     y  -> 202
		GET    /blob/bad        -> 200  y
		GET    /readyz          -> 200  ~"failed_background_writes":1
	`)
}

// Writes of one key stay in their order if the first of them has to be tried again, alone.
func TestRetryKeepsOrder(t *testing.T) {
	s := newTestServer(t, oneShard)
	committed := make(chan string, 2)
	attempts := 0
	first := &op{key: "k", background: true, do: func(*tx) error {
		attempts++
		switch attempts {
		case 1:
			return errors.New("the batch fails")
		case 2:
			return errBusy // the operation alone meets a foreign lock
		}
		committed <- "first"
		return nil
	}}
	second := &op{key: "k", background: true, do: func(*tx) error {
		committed <- "second"
		return nil
	}}
	sh := s.store.shards[0]
	open := gate(sh)
	fatal(t, sh.batcher.add(first))
	fatal(t, sh.batcher.add(second))
	open()
	eventually(t, "both are committed", func() bool { return len(committed) == 2 })
	got := <-committed + " " + <-committed
	expect(t, got == "first second", "committed %s", got)
}

// A write that finds the queue full waits for room, and is then told so.
func TestFlood(t *testing.T) {
	s := script(t, `
		serve  num_shards=1  async_write=true  batch_timeout_ms=60000  max_pending_bytes=6000
	`)
	s.store.queueTimeout = ms(50)
	s.script(`
		PUT /blob/a      {noise 1000}  -> 202
		PUT /blob/b      {noise 1000}  -> 503  too busy, try again  Retry-After: 1
		# A reader lets the queue be committed: there is room again.
		GET /blob/a                    -> 200
		PUT /blob/b      {noise 1000}  -> 202
		GET /blob/b                    -> 200
		# One operation always fits.
		PUT /blob/large  {noise 2C}    -> 202
		GET /blob/large                -> 200  {noise 2C}
	`)
}

// A shard that another process has locked is not ready, also if nobody writes. The lock delays what
// was answered 202. Whoever waits behind such a write is told. The shard is ready again by itself.
func TestForeignLock(t *testing.T) {
	t.Parallel() // it mostly waits
	s := script(t, `
		serve  num_shards=1  async_write=true
		writer PRAGMA busy_timeout = 200
		lock   data/shard_0.db
		wait GET /readyz                         -> 503
		unlock
		wait GET /readyz                         -> 200
		log    msg="shard is not ready"          -> 1
		log    msg="shard is ready again"        -> 1
		lock   data/shard_0.db
		PUT    /blob/k  v                        -> 202
	`)
	s.client = &http.Client{Timeout: 2 * busyTimeout}
	s.script(`
		GET    /blob/k                           -> 503  Retry-After: 1
		HEAD   /blob/k                           -> 503  Retry-After: 1
		GET    /blob/                            -> 503  Retry-After: 1
		PUT    /blob/large  {noise 3C}           -> 503  Retry-After: 1
		PUT    /blob/other  If-None-Match: *  x  -> 503  Retry-After: 1
		GET    /readyz                           -> 503
		PUT    /blob/k  w                        -> 202
		unlock
		wait GET /blob/k                         -> 200  w  Blob-Version: 1
		wait GET /readyz                         -> 200
	`)
}

// However many wait behind a foreign lock, and for room in the queue, all are told within 10 s.
func TestForeignLockOfMany(t *testing.T) {
	t.Parallel() // it mostly waits
	s := script(t, `
		serve  num_shards=1  batch_size=1  max_pending_bytes=300000
		lock   data/shard_0.db
	`)
	together(12, func(i int) {
		time.Sleep(ms(500 * (i % 4)))
		start := time.Now()
		s.want(503, "PUT", fmt.Sprint("/blob/", i), noise(50_000, 1))
		took := time.Since(start)
		expect(t, took < 10*time.Second, "write %d is told after %v", i, took)
	})
	s.script("unlock")
}

// On a full disk every shard reads and deletes, also after a restart. The room that deletes make
// is used again.
func TestDiskFull(t *testing.T) {
	t.Parallel() // it waits for upkeep
	for _, row := range []struct{ size, count int }{
		{6000, 1000},
		{300_000, 24},
	} {
		quarter := row.count / 4
		script(t, strings.ReplaceAll(`
			mount     42m
			serve
			`+each(1, row.count, "PUT /blob/k%d  {noise SIZE} -> 201")+`
			fill-disk C
			PUT       /blob/big  {noise 10C}     -> 507  disk full
			`+each(1, 2*quarter, "DELETE /blob/k%d -> 204")+`
			stop
			serve
			`+each(2*quarter+1, 3*quarter, "DELETE /blob/k%d -> 204")+`
			wait GET  /readyz                    -> 200
			`+each(1, quarter, "wait PUT /blob/k%d  {noise SIZE} -> 201")+`
			`+each(3*quarter+1, row.count, "GET /blob/k%d -> 200  {noise SIZE}")+`
		`, "SIZE", fmt.Sprint(row.size)))
	}
}

// A clean stop leaves the reserve, so that the server starts, and deletes, on a disk that others
// have filled meanwhile.
func TestStartOnFullDisk(t *testing.T) {
	t.Parallel() // it waits for upkeep
	script(t, `
		mount     32m
		serve
		`+each(1, 40, "PUT /blob/k%d  {noise 100000}")+`
		stop
		fill-disk 0
		serve
		GET       /blob/k1               -> 200  {noise 100000}
		`+each(2, 39, "DELETE /blob/k%d  -> 204")+`
		PUT       /blob/new  {noise 20C} -> 507  disk full
		stop
		serve
		GET       /blob/k1               -> 200  {noise 100000}
		DELETE    /blob/k40              -> 204
		remove    filler
		wait GET  /readyz                -> 200
		PUT       /blob/new  {noise 20C} -> 201
	`)
}

// A delete that finds the disk full frees more than it takes.
func TestDeleteOnFullDisk(t *testing.T) {
	t.Parallel() // it waits for upkeep
	script(t, `
		mount     32m
		serve     num_shards=1
		`+each(1, 8, "PUT /blob/k%d  {noise 100000}")+`
		stop
		# A new WAL, which has to grow with each write.
		serve     num_shards=1
		`+each(1, 8, "PUT /blob/k%d  {noise 100000}")+`
		fill-disk 0
		# It has the room of the reserve.
		DELETE    /blob/k1               -> 204
		fill-disk 0
		# Others have taken that. It has the room of the WAL.
		DELETE    /blob/k2               -> 204
		GET       /blob/k3               -> 200  {noise 100000}
	`)
}

// The reserve is kept for deletes. A write that finds the disk full leaves it, and so others cannot
// take it.
func TestReserveIsForDeletes(t *testing.T) {
	t.Parallel() // it waits for upkeep
	script(t, `
		mount     32m
		serve     num_shards=1
		`+each(1, 8, "PUT /blob/k%d  {noise 100000}")+`
		fill-disk 0
		PUT       /blob/new  {noise 100000} -> 507  disk full
		fill-disk 0
		DELETE    /blob/k1                  -> 204
		GET       /blob/k2                  -> 200  {noise 100000}
		remove    filler
		wait GET  /readyz                   -> 200
		PUT       /blob/new  {noise 100000} -> 201
	`)
}

// As long as the reserve finds no room the disk counts as full: only reads and deletes work, and
// in async mode, too, a write is told.
func TestNoRoomForReserve(t *testing.T) {
	t.Parallel() // it waits for upkeep
	for _, mode := range []string{"async_write=false", "async_write=true"} {
		script(t, strings.ReplaceAll(`
			serve   num_shards=1
			PUT     /blob/k     v
			PUT     /blob/gone  {noise 3C}
			stop
			remove  data/blobnom.reserve
			# MODE: a directory is in the way of the file.
			write   data/blobnom.reserve/in-the-way
			serve   num_shards=1  MODE
			PUT     /blob/k      x             -> 507  disk full
			PUT     /blob/empty  ""            -> 507  disk full
			PUT     /blob/large  {noise 3C}    -> 507  disk full
			GET     /readyz                    -> 503  ~disk full
			GET     /blob/k                    -> 200  v
			DELETE  /blob/gone                 -> 204
			wait sql data  SELECT count(*) FROM chunks  -> 0
			log     msg="disk full: only reads and deletes work -> 1
			log     status=507                 -> 0
			remove  data/blobnom.reserve
			wait GET /readyz                   -> 200
			PUT     /blob/k  x
			GET     /blob/k                    -> 200  x
			log     msg="the disk has room again -> 1
		`, "MODE", mode))
	}
}

// A stop on a full disk takes the reserve back if there is room for it.
func TestReserveAtStop(t *testing.T) {
	script(t, `
		serve   num_shards=1
		writer  PRAGMA max_page_count = 500
		PUT     /blob/big  {noise 32C}  -> 507  disk full
		stop
		ls      data  -> 3  blobnom.lock blobnom.reserve shard_0.db
	`)
}

// An upload that meets a full disk in its middle is told so, while its client still sends.
func TestFullInTheMiddle(t *testing.T) {
	t.Parallel() // it waits for upkeep
	script(t, `
		serve     num_shards=1
		PUT       /blob/k  v
		writer    PRAGMA max_page_count = 500
		`+strings.Repeat("PUT  /blob/big  {noise 32C} -> 507  disk full\n", 10)+`
		GET       /blob/k                -> 200  v
		DELETE    /blob/k                -> 204
		writer    PRAGMA max_page_count = 1000000
		wait PUT  /blob/big  {noise 32C} -> 201
		wait GET  /readyz                -> 200
	`)
}

// A database that may not grow any more (ulimit -f) is a full disk. Deletes make room.
func TestMaximumFileSize(t *testing.T) {
	t.Parallel()                                 // it waits for upkeep
	const limit = `ulimit -f 20000 && exec "$0"` // 10 or 20 MB
	limited := exec.Command("sh", "-c", limit, os.Args[0])
	p := startBy(t, limited, t.TempDir(), "BLOBNOM_NUM_SHARDS=1")
	p.script(`
		PUT       /blob/old  {noise 24C} -> 201
		PUT       /blob/big  {noise 80C} -> 507  disk full
		DELETE    /blob/old              -> 204
		wait GET  /readyz                -> 200
		wait PUT  /blob/new  {noise 32C} -> 201
		GET       /blob/new              -> 200  {noise 32C}
	`)
	fatal(t, p.signal(os.Interrupt))
}

// The reserve is tried at most once a second.
func TestReserve(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &testServer{t: t, log: new(syncBuffer)}
		r := &reserve{
			path: filepath.Join(t.TempDir(), reserveFile),
			log:  slog.New(slog.NewTextHandler(s.log, nil)),
		}
		want := func(when string, isFull bool, size int64) {
			t.Helper()
			expect(t, r.isDiskFull() == isFull, "%s: full %v", when, r.isDiskFull())
			expect(t, sizeOf(r.path) == size, "%s: a reserve of %d bytes", when, sizeOf(r.path))
		}
		r.begin()
		want("at the first start", false, reserveBytes)
		content := noErr(os.ReadFile(r.path))
		hasHole := bytes.Contains(content, make([]byte, 4096))
		expect(t, !hasHole, "a file system may store the reserve with holes")
		r.setFull(errFull)
		r.setFull(errFull)
		want("on a full disk", true, reserveBytes)
		time.Sleep(sweepInterval)
		r.giveUp()
		want("given up", true, -1)
		r.restore()
		want("within a second", true, -1)
		time.Sleep(sweepInterval)
		r.restore()
		want("after a second", false, reserveBytes)
		s.script(`
			log  msg="disk full: only reads    -> 1
			log  msg="the disk has room again  -> 1
		`)
	})
}

// A write whose sync fails is answered 500 and not seen. After it nothing is written or
// checkpointed any more, so that what was answered before is there after a restart. With durability
// "normal" the first sync is that of a checkpoint.
func TestFailedSync(t *testing.T) {
	for _, values := range []*strings.Replacer{
		strings.NewReplacer("DURABILITY", "full", "WRITTEN", "500", "FOUND", "404"),
		strings.NewReplacer("DURABILITY", "normal", "WRITTEN", "201", "FOUND", "200"),
	} {
		s := script(t, values.Replace(`
			# durability DURABILITY
			clock   2026-01-02T03:04:05Z
			serve   num_shards=1  durability=DURABILITY
			PUT     /blob/before           {noise 3000}  -> 201
			PUT     /blob/expires?ttl=1s   {noise 3000}  -> 201
			break   fsync fdatasync  EIO
			PUT     /blob/next             {noise 3000}  -> WRITTEN
			PUT     /blob/large            {noise 40C}   -> 500
			keep    data
			clock   +1m
			DELETE  /blob/before                         -> 500
			PUT     /blob/before           x             -> 500
			PUT     /blob/large            {noise 3C}    -> 500
			GET     /blob/large                          -> 404
			GET     /blob/next                           -> FOUND
			GET     /readyz                -> 503  ~a sync of the disk failed; restart the server
		`))
		s.store.shards[0].upkeep() // would delete what has expired; the batcher has nothing to do
		s.script(values.Replace(`
			# after durability DURABILITY
			stop
			same    data
			serve   num_shards=1
			GET     /blob/before                         -> 200  {noise 3000}
			GET     /blob/next                           -> FOUND
			PUT     /blob/after            x             -> 201
			GET     /readyz                              -> 200
		`))
	}
}

// After a failed sync a write is not answered 202 any more: it cannot come true.
func TestFailedSyncOfAsync(t *testing.T) {
	script(t, `
		serve   num_shards=1  async_write=true  durability=full
		PUT     /blob/k     v  -> 202
		GET     /blob/k        -> 200  v
		break   fsync fdatasync  EIO
		# Nobody knows yet when this is answered; everybody knows after it.
		PUT     /blob/lost  x  -> 202
		GET     /blob/lost     -> 404
		GET     /readyz        -> 503
		PUT     /blob/k     w  -> 500
		DELETE  /blob/k        -> 500
		GET     /blob/k        -> 200  v
	`)
}

// A quota and a maximum size of files are a full disk to a client, other write errors are not.
func TestQuota(t *testing.T) {
	scripts(t, `
		serve  num_shards=1
		PUT    /blob/k  v
	`, `
		# a quota
		break  pwrite64  EDQUOT
		PUT    /blob/new  x                    -> 507  disk full
		PUT    /blob/new  x                    -> 507  disk full
		GET    /blob/k                         -> 200  v
		log    msg="disk full: only reads      -> 1

		# a maximum size of files
		break  pwrite64  EFBIG
		PUT    /blob/new  x                    -> 507  disk full
		GET    /blob/k                         -> 200  v
		log    msg="disk full: only reads      -> 1

		# a write error
		break  pwrite64  EIO
		PUT    /blob/new  x                    -> 500
		PUT    /blob/new  x                    -> 500
		GET    /readyz                         -> 503
		GET    /blob/k                         -> 200  v
		log    disk full                       -> 0
	`)
}

// What the disk does not let be read at a start is not called corrupt: a restore would lose data.
func TestUnreadableAtStart(t *testing.T) {
	script(t, `
		serve  num_shards=1
		PUT    /blob/k  v
		stop
		open   pread64   EIO     -> refused  ~shard_0.db  ~disk I/O error  !corrupt  !restore
		open   pread64   ENOMEM  -> refused  ~shard_0.db  ~disk I/O error  !corrupt  !restore
		open   pwrite64  EIO     -> refused  ~shard_0.db  ~disk I/O error  !corrupt  !restore
		open   pwrite64  EDQUOT  -> refused  ~shard_0.db  ~disk full       !corrupt  !restore
		serve  num_shards=1
		GET    /blob/k           -> 200  v
	`)
}

// SQLite calls a file damaged when one read fails. Such a read is tried again, and nothing stays.
func TestReadThatFailsOnce(t *testing.T) {
	s := script(t, `serve  num_shards=1`)
	for _, row := range []struct {
		failures int // in a row
		ready    string
	}{
		{1, "200"},
		{1, "200"},
		{2, "503  ~shard is corrupt"},
	} {
		s.asWriter(&op{}, func() {
			for range row.failures {
				s.store.shards[0].recordOutcome(fmt.Errorf("%w: as SQLite says", errCorrupt))
			}
		})
		s.script("GET /readyz -> " + row.ready)
	}
}

// A backup brings an empty WAL along. If another user restored it, the server may not open it, and
// removes it. A WAL with something in it is needed, and stays.
func TestRestoredByAnotherUser(t *testing.T) {
	dir := t.TempDir()
	empty := filepath.Join(dir, "empty-wal")
	full := filepath.Join(dir, "full-wal")
	fatal(t, os.WriteFile(empty, nil, 0o600))
	fatal(t, os.WriteFile(full, []byte("x"), 0o600))
	err := whileBroken(t, []string{"openat", "EACCES"}, func() error {
		if err := tryOpen(empty); err != nil {
			return fmt.Errorf("the empty WAL: %w", err)
		}
		return tryOpen(full)
	})
	isNamed := errors.Is(err, os.ErrPermission) && strings.Contains(err.Error(), full)
	expect(t, isNamed, "%v does not name the WAL that is needed", err)
	expect(t, !fileExists(empty), "the empty WAL is still there")
	expect(t, fileExists(full), "a WAL with content was removed")
}

// What the writer's connection is told, for each durability: what an answered write survives
// depends on it.
func TestPragmas(t *testing.T) {
	const syncs = `SELECT synchronous || ' ' || fullfsync || ' ' || checkpoint_fullfsync
		FROM pragma_synchronous, pragma_fullfsync, pragma_checkpoint_fullfsync`
	script(t, strings.ReplaceAll(`
		serve   num_shards=1  durability=full
		writer  SYNCS                      -> 2 1 1
		writer  PRAGMA journal_mode        -> wal
		writer  PRAGMA journal_size_limit  -> 6291456
		writer  PRAGMA wal_autocheckpoint  -> 0
		writer  PRAGMA busy_timeout        -> 4000
		# Chunks are committed without a sync. What makes them visible is synced with them.
		writer  PRAGMA synchronous  chunk  -> 1
		writer  PRAGMA synchronous         -> 2
		stop
		serve   num_shards=1  durability=normal
		writer  SYNCS                      -> 1 0 0
		writer  PRAGMA synchronous  chunk  -> 1
		stop
		serve   num_shards=1  durability=off
		writer  SYNCS                      -> 0 0 0
		writer  PRAGMA synchronous  chunk  -> 0
	`, "SYNCS", strings.Join(strings.Fields(syncs), " ")))
}

// The WAL is copied into the database before it outgrows the reserve, and the next write begins it
// anew.
func TestCheckpoint(t *testing.T) {
	s := newTestServer(t, oneShard)
	wal := s.store.shards[0].path + "-wal"
	for _, size := range []int{10, 4 << 10, 200 << 10, 3 << 20} {
		writes := 20 << 20 / (size + 8<<10)
		for i := range writes {
			key := fmt.Sprint(size, "-", i%1000)
			s.put(key, noise(size, uint64(i)))
			if n := sizeOf(wal); n > reserveBytes-spareBytes {
				t.Fatalf("blobs of %d bytes: the WAL has %d bytes", size, n)
			}
		}
	}
}

// Upkeep keeps the WAL small, too: many blobs expire while nobody writes.
func TestCheckpointOfUpkeep(t *testing.T) {
	t.Parallel() // it waits for upkeep
	s := script(t, `
		serve  num_shards=1
		stop
		sql    data/shard_0.db  `+numbers+` INSERT INTO blobs SELECT i, hex(randomblob(200)), 0, x'`+sumOf(nil)+`', 0, 0, 0, '', 0, 0, 1, 0, '' FROM n
		serve  num_shards=1
	`)
	most := int64(0)
	eventually(t, "all are swept", func() bool {
		most = max(most, sizeOf(s.path("data/shard_0.db-wal")))
		return countRows(t, s.path("data"), "SELECT count(*) FROM blobs") == 0
	})
	// It grows while countRows reads. Without checkpoints it has 30 MB and more.
	expect(t, most <= 3*reserveBytes, "the WAL had %d bytes", most)
}

// A reader of another process, which keeps the WAL from being emptied, does not delay a stop.
func TestReaderDelaysNobody(t *testing.T) {
	s := script(t, `
		serve  num_shards=1
		PUT    /blob/k  v
	`)
	hold(t, openReadOnly(s.path("data/shard_0.db")), "BEGIN; SELECT count(*) FROM blobs")
	s.script(`PUT /blob/k  w`)
	start := time.Now()
	s.script(`stop`)
	took := time.Since(start)
	expect(t, took < busyTimeout, "the stop took %v", took)
}

// A directory that is refused is left alone: what has expired in it, too.
func TestRefusedIsUntouched(t *testing.T) {
	script(t, `
		clock  2026-01-02T03:04:05Z
		serve
		PUT    /blob/k?ttl=1s  v
		stop
		clock  +1h
		keep   data
		# Upkeep would need a moment.
		`+strings.Repeat("serve  num_shards=8  -> refused  ~holds 4 shards\n", 20)+`
		same   data
	`)
}

// What has expired leaves the cache with its row, so that a clock that goes back does not bring it
// back.
func TestExpiredLeavesCache(t *testing.T) {
	t.Parallel() // it waits for upkeep
	script(t, `
		clock  2026-01-02T03:04:05Z
		serve  num_shards=1
		PUT    /blob/a?ttl=1m  v                   -> 201
		PUT    /blob/b?ttl=1m  v                   -> 201
		GET    /blob/a                             -> 200  v
		GET    /blob/b                             -> 200  v
		clock  +1m
		GET    /blob/a                             -> 404
		wait sql data  SELECT count(*) FROM blobs  -> 0
		clock  -1m
		GET    /blob/a                             -> 404
		GET    /blob/b                             -> 404
	`)
}

// A shard that is written to now and then returns its free pages, too.
func TestSpaceReturnsUnderWrites(t *testing.T) {
	t.Parallel() // it waits for upkeep
	s := script(t, `
		serve   num_shards=1
		PUT     /blob/large  {noise 80C}
		DELETE  /blob/large
	`)
	eventually(t, "the file shrinks", func() bool {
		s.put("small", []byte("x"))
		return sizeOf(s.path("data/shard_0.db")) < 4<<20
	})
	// The checkpoint that made it shrink did not wait for a lock. A write does.
	s.script(`writer PRAGMA busy_timeout -> 4000`)
}

// A shard keeps the page size with which it was made, whatever that of new ones is.
func TestPageSizes(t *testing.T) {
	s := script(t, `
		serve  num_shards=1
		sql    data  PRAGMA page_size           -> 4096
		PUT    /blob/old/small  {noise 10}      -> 201
		PUT    /blob/old/row    {noise C}       -> 201
		PUT    /blob/old/large  {noise 3C+5}    -> 201
	`)
	for _, size := range []int64{1 << 10, 8 << 10, 64 << 10} {
		s.script(strings.ReplaceAll(`
			stop
			sql    data/shard_0.db  PRAGMA journal_mode = DELETE
			sql    data/shard_0.db  PRAGMA page_size = SIZE; VACUUM
			serve  num_shards=1
			sql    data  PRAGMA page_size           -> SIZE
			GET    /blob/old/small                  -> 200  {noise 10}
			GET    /blob/old/row                    -> 200  {noise C}
			GET    /blob/old/large                  -> 200  {noise 3C+5}
			# This replaces what was written with other pages.
			PUT    /blob/row    {noise C SIZE:C}    -> 201
			PUT    /blob/large  {noise 4C SIZE:4C}  -> 201
			GET    /blob/row                        -> 200  {noise C SIZE:C}
			GET    /blob/large                      -> 200  {noise 4C SIZE:4C}
		`, "SIZE", fmt.Sprint(size)))
		counted := s.store.shards[0].pageBytes
		expect(t, counted == size, "a page counts as %d bytes, want %d", counted, size)
	}
	s.script(`
		stop
		blobnom check data  -> 0  ~0 defects
	`)
}

// ============================================================================
// Batcher
//
// On a fake clock, with a fake commit: exact sizes and times, no sleeping.
// ============================================================================

// fakeBatcher is a batcher whose commits take a while. batches says when each began, in ms, and
// with which keys.
type fakeBatcher struct {
	*batcher
	start   time.Time
	stop    chan struct{}
	takes   int
	batches []string
}

func newFakeBatcher(size, window, takes int, upkeep func() time.Duration) *fakeBatcher {
	b := &fakeBatcher{
		start: time.Now(),
		stop:  make(chan struct{}),
		takes: takes,
	}
	b.batcher = &batcher{
		size:     size,
		window:   ms(window),
		stopping: b.stop,
		commit:   b.record,
		upkeep:   upkeep,
		wake:     make(chan struct{}, 1),
		ended:    make(chan struct{}),
		newest:   map[string]*op{},
		stuck:    make(chan struct{}),
	}
	return b
}

func (b *fakeBatcher) now() int64 { return time.Since(b.start).Milliseconds() }

func (b *fakeBatcher) sleepUntil(at int) {
	time.Sleep(ms(at) - time.Since(b.start))
}

func (b *fakeBatcher) record(batch []*op) {
	entry := fmt.Sprintf("%d:", b.now())
	for _, o := range batch {
		entry += o.key
	}
	b.batches = append(b.batches, entry)
	time.Sleep(ms(b.takes))
	for _, o := range batch {
		b.end(o)
	}
}

// play does a step: a time in ms and the key of a write. "!" makes the write urgent, "+" large; "?"
// is a reader of the key, "." alone is a stop.
func (b *fakeBatcher) play(t *testing.T, step string) {
	var at int
	var key, kind string
	fmt.Sscanf(step, "%d%1s%s", &at, &key, &kind)
	b.sleepUntil(at)
	o := &op{key: key, background: true, urgent: kind == "!", since: time.Now()}
	switch {
	case key == ".":
		close(b.stop)
		return
	case kind == "?":
		go b.settle(key)
		return
	case kind == "+":
		o.data = make([]byte, batchBytes/2)
	}
	fatal(t, b.add(o))
	synctest.Wait()
}

func TestBatcher(t *testing.T) {
	upkeep := func() time.Duration { return ms(1) }
	for _, c := range []struct {
		name                string
		size, window, takes int // the last two in ms
		steps, want         string
	}{
		{"off", 1, 0, 5, "0a 1b 1c", "0:a 5:b 10:c"},
		{"what is queued", 4, 0, 5, "0a 1b 2c", "0:a 5:bc"},
		{"at most size", 2, 0, 5, "0a 1b 1c 1d", "0:a 5:bc 10:d"},
		{"window from the first", 9, 10, 0, "0a 6b 9c 12d", "10:abc 22:d"},
		{"upkeep every millisecond does not cut the window", 9, 300, 0, "0a", "300:a"},
		{"a full batch does not wait", 2, 10, 0, "0a 3b 4c", "3:ab 14:c"},
		{"waited during a commit", 9, 10, 30, "0a 12b 13c", "10:a 40:bc"},
		{"urgent", 9, 10, 0, "0a 4b! 5c", "4:ab 15:c"},
		{"a reader hurries", 9, 10, 0, "0a 3a? 5b", "3:a 15:b"},
		{"a stop hurries", 9, 10, 0, "0a 3. 5b", "3:a 5:b"},
		{"close does not wait, and drains", 2, 3_600_000, 1, "0a 0b 0c", "0:ab 400:c"},
		{"bytes", 9, 0, 5, "0a 1b+ 1c+ 1d", "0:a 5:bc 10:d"},
		{"bytes end the window", 9, 10, 0, "0a+ 3b+ 4c", "3:ab 14:c"},
	} {
		synctest.Test(t, func(t *testing.T) {
			b := newFakeBatcher(c.size, c.window, c.takes, upkeep)
			go b.run()
			for _, step := range strings.Fields(c.steps) {
				b.play(t, step)
			}
			b.sleepUntil(400)
			b.close()
			got := strings.Join(b.batches, " ")
			expect(t, got == c.want, "%s: %s, want %s", c.name, got, c.want)
			left := len(b.newest)
			expect(t, left == 0, "%s: %d keys are left", c.name, left)
			expect(t, b.add(&op{}) == errStopping, "%s: open after close", c.name)
		})
	}
}

// The batcher of a shard is as configured.
func TestBatchSettings(t *testing.T) {
	s := script(t, `serve  num_shards=1  batch_size=3  batch_timeout_ms=1500`)
	b := s.store.shards[0].batcher
	expect(t, b.size == 3, "batch_size 3 became %d", b.size)
	expect(t, b.window == ms(1500), "batch_timeout_ms 1500 became %v", b.window)
}

// Operations that have to be tried again come first, in their order, and a reader that waits for
// one of them is told.
func TestTriedAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newFakeBatcher(2, 0, 5, func() time.Duration { return time.Hour })
		failures := 2
		b.commit = func(batch []*op) {
			if failures == 0 {
				b.record(batch)
				return
			}
			failures--
			time.Sleep(ms(5))
			b.putBack(batch)
		}
		go b.run()
		for _, key := range []string{"a", "b", "c"} {
			fatal(t, b.add(&op{key: key, background: true}))
		}
		got := fmt.Sprint(b.settle("b"), b.now())
		expect(t, got == "too busy, try again 5", "a reader is told %s", got)
		b.close()
		got = fmt.Sprint(b.batches, b.settle("b"))
		expect(t, got == "[10:ab 15:c] <nil>", "committed, and a reader is told, %s", got)
	})
}

// Upkeep runs between batches, each time as long after the last as that asked for.
func TestUpkeepBetweenBatches(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newFakeBatcher(1, 0, 35, nil)
		runs := []int64{}
		b.upkeep = func() time.Duration {
			runs = append(runs, b.now())
			return ms(10 * len(runs)) // 10, 20, 30, ...
		}
		go b.run()
		b.sleepUntil(5)
		fatal(t, b.add(&op{key: "a"})) // until 40
		b.sleepUntil(150)
		b.close()
		got := fmt.Sprint(b.batches, runs)
		expect(t, got == "[5:a] [0 40 60 90 130]", "batches and upkeep at %s", got)
	})
}

// A writer waits for room in the queue, for queueTimeout at most.
func TestBudget(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, stop := context.WithCancel(t.Context())
		st := &store{maxPending: 10, queueTimeout: time.Second, stopping: ctx}
		for _, c := range []struct {
			n    int64
			then func() // 298 ms later
			want string
		}{
			{6, func() {}, "0:<nil>"},
			{6, func() { st.pending.Add(-6) }, "300:<nil>"},
			{4, func() {}, "0:<nil>"},
			{1, func() {}, "1005:too busy, try again"},
			{1, stop, "298:server is stopping"},
		} {
			start := time.Now()
			time.AfterFunc(ms(298), c.then)
			err := st.acquire(c.n)
			got := fmt.Sprintf("%d:%v", time.Since(start).Milliseconds(), err)
			expect(t, got == c.want, "%d bytes: %s, want %s", c.n, got, c.want)
		}
		expect(t, st.pending.Load() == 10, "%d bytes pending", st.pending.Load())
	})
}

// ============================================================================
// Cache
// ============================================================================

func newCache() *cache {
	return &cache{
		limit:   20_000,
		entries: map[string]*blob{},
		blocked: map[string]bool{},
	}
}

// read puts a blob of so many bytes as a reader that finds it in the database does.
func (c *cache) read(key string, size int) {
	_, generation := c.get(key)
	b := &blob{size: int64(size), data: make([]byte, size)}
	c.put(key, b, generation)
}

func TestCache(t *testing.T) {
	c := newCache()
	_, before := c.get("k")
	for _, row := range []struct {
		name, steps string
		isKept      bool
	}{
		{"read while a transaction may change it", "block read", false},
		{"read before the commit", "drop put-old", false},
		{"read after the commit", "read", true},
		{"in a transaction", "block", false},
		{"too large", "drop read-large", false},
		{"in chunks", "read-chunked", false},
		{"read again", "read", true},
	} {
		for step := range strings.FieldsSeq(row.steps) {
			switch step {
			case "block":
				c.block("k")
			case "drop":
				c.unblock("k")
			case "put-old":
				c.put("k", &blob{}, before)
			case "read":
				c.read("k", 1)
			case "read-large":
				c.read("k", cacheItem+1)
			case "read-chunked":
				c.read("k", chunkSize+1)
			}
		}
		b, _ := c.get("k")
		isKept := b != nil
		expect(t, isKept == row.isKept, "%s: kept %v, want %v", row.name, isKept, row.isKept)
	}
}

// The cache holds at most limit bytes, and the newest blob is among them. The shards share
// cacheBytes.
func TestCacheLimit(t *testing.T) {
	s := script(t, `serve  num_shards=4`)
	limit := s.store.shards[0].cache.limit
	expect(t, limit <= cacheBytes/4, "one of four shards may cache %d bytes", limit)
	c := newCache()
	for i := range 100 {
		key := fmt.Sprint(i)
		c.read(key, 1000)
		c.read(key, 900) // as another reader of the key does
		b, _ := c.get(key)
		expect(t, b != nil, "the newest is missing")
		expect(t, c.bytes <= c.limit, "%d bytes of at most %d", c.bytes, c.limit)
	}
	count := len(c.entries)
	expect(t, count > 10, "only %d blobs of 900 bytes in %d", count, c.limit)
	for key := range maps.Clone(c.entries) {
		c.block(key)
	}
	expect(t, c.bytes == 0, "%d bytes in an empty cache", c.bytes)
}

// Readers never see an older version after a newer, nor miss an acknowledged write, with the cache
// and the queue of async mode in between.
func TestReadsAreMonotonic(t *testing.T) {
	for _, isAsync := range []bool{false, true} {
		s := newTestServer(t, oneShard, func(c *config) { c.AsyncWrite = isAsync })
		s.put("k", []byte("0"))
		var acknowledged atomic.Int64
		var readers sync.WaitGroup
		for range 4 {
			readers.Go(func() {
				newest := int64(0)
				for newest < 500 && !t.Failed() {
					least := max(newest, acknowledged.Load())
					_, body, err := s.do("GET", "/blob/k", nil)
					newest, _ = strconv.ParseInt(string(body), 10, 64)
					isNew := err == nil && newest >= least
					expect(t, isNew, "read %q, %v after %d", body, err, least)
				}
			})
		}
		for i := range int64(501) {
			s.put("k", strconv.AppendInt(nil, i, 10))
			acknowledged.Store(i)
		}
		readers.Wait()
		s.script(`GET /blob/k -> 200  500`)
		s.put("unread", []byte("x"))
		s.script(`GET /blob/ -> 200  ~unread`) // it is committed
		cached := len(s.store.shards[0].cache.entries)
		expect(t, cached == 1, "%d blobs in the cache, want the one that was read", cached)
	}
}

// ============================================================================
// Maintenance
// ============================================================================

// blobs verifies a directory at rest. It answers how many blobs it holds, and a line for each that
// begins with the key, the SHA-256, the size and the version: ["KEY",{tag CONTENT},5,0
func (s *testServer) blobs(fields []string) answer {
	s.t.Helper()
	dir := s.path(fields[0])
	verifyDir(s.t, dir)
	files, err := filepath.Glob(filepath.Join(dir, "shard_*.db"))
	fatal(s.t, err)
	var lines []string
	for _, file := range files {
		db := openDB(file, "mode=ro")
		defer db.Close()
		rows, err := db.Query(`SELECT json_array(key, lower(hex(sha256)), size, version,
			content_type, created_at, updated_at, expires_at) FROM blobs`)
		fatal(s.t, err)
		for rows.Next() {
			var line string
			fatal(s.t, rows.Scan(&line))
			lines = append(lines, line)
		}
		fatal(s.t, rows.Err())
	}
	slices.Sort(lines)
	return answer{status: strconv.Itoa(len(lines)), text: strings.Join(lines, "\n")}
}

// alike wants two directories at rest to hold the same blobs.
func (s *testServer) alike(fields []string) answer {
	s.t.Helper()
	first := s.blobs(fields[:1])
	second := s.blobs(fields[1:])
	return answer{text: first.text + "\nand\n" + second.text, isError: first.text != second.text}
}

// hold executes SQL over a connection that stays open until the test ends: "hold FILE  TEXT".
func (s *testServer) hold(fields []string) answer {
	s.t.Helper()
	fatal(s.t, os.MkdirAll(filepath.Dir(s.path(fields[0])), 0o700))
	hold(s.t, openDB(s.path(fields[0]), "_pragma=busy_timeout(5000)"), fields[1])
	return answer{}
}

// mode answers the type and the permissions of a file.
func (s *testServer) mode(fields []string) answer {
	s.t.Helper()
	info, err := os.Stat(s.path(fields[0]))
	fatal(s.t, err)
	return answer{status: info.Mode().String()}
}

// copyLeaf copies a leaf page of a table over another one: "leaf FILE  TABLE 2  TABLE 9".
func (s *testServer) copyLeaf(fields []string) answer {
	s.t.Helper()
	path := s.path(fields[0])
	data, err := os.ReadFile(path)
	fatal(s.t, err)
	leaf := func(field string) []byte {
		table, number, _ := strings.Cut(field, " ")
		const query = `SELECT pgoffset || ' ' || pgsize FROM dbstat
			WHERE name = '%s' AND pagetype = 'leaf' ORDER BY path LIMIT 1 OFFSET %s`
		page := s.query([]string{path, fmt.Sprintf(query, table, number)}).status
		var offset, size int
		noErr(fmt.Sscan(page, &offset, &size))
		return data[offset:][:size]
	}
	copy(leaf(fields[2]), leaf(fields[1]))
	fatal(s.t, os.WriteFile(path, data, 0o600))
	return answer{}
}

// A blob that is damaged on the disk is never taken for a whole one: its GET is a 500 or cut off,
// the second one, too, and the log tells. It can be replaced and deleted. The shard stays ready.
func TestDamagedContent(t *testing.T) {
	const flip = "data = CAST(substr(data, 1, 99) || x'00' || substr(data, 101) AS BLOB)"
	scriptRows(t, `
		serve   num_shards=1  storage_compression=true  output_compression=true
		PUT     /blob/k  $2   Content-Type: text/plain
		sql     data/shard_0.db  UPDATE $3
		GET     /blob/k       Accept-Encoding: $4  -> $5  $6
		GET     /blob/k       Accept-Encoding: $4  -> $5  $6
		log     the blob is damaged  -> 2
		GET     /readyz       -> 200
		PUT     /blob/k  new  -> 201
		GET     /blob/k       -> 200  new
		DELETE  /blob/k       -> 204
	`, strings.ReplaceAll(`
		small            {noise 900}     blobs SET FLIP                    identity  500  ~damaged
		small, deflated  {prose 900}     blobs SET FLIP                    identity  500  ~damaged
		one chunk        {noise 200000}  blobs SET FLIP                    identity  500  ~damaged
		small, as gzip   {noise 20000}   blobs SET FLIP                    gzip      500  ~damaged
		a row            {noise 900}     blobs SET updated_at = 'x'        identity  500  ~damaged
		a row of chunks  {noise 3C}      blobs SET updated_at = 'x'        identity  500  ~damaged
		first chunk      {noise 3C}      chunks SET FLIP WHERE id & 3 = 0  identity  200  cut
		second, as gzip  {noise 3C}      chunks SET FLIP WHERE id & 3 = 1  gzip      200  cut
		last chunk       {noise 3C}      chunks SET FLIP WHERE id & 3 = 2  identity  200  cut
		deflated chunk   {prose 3C}      chunks SET FLIP WHERE id & 3 = 1  identity  200  cut
	`, "FLIP", flip))
}

// sample has every kind of blob: small and large, as it is and deflated.
const sample = `
	serve storage_compression=true
	PUT /blob/empty   ""
	PUT /blob/small   {noise 5000}
	PUT /blob/text    {prose 5000}
	PUT /blob/large   {noise 3C}
	PUT /blob/novel   {prose 3C+5}
	PUT /blob/more/0  {prose 1}
	PUT /blob/more/1  {prose 200}
	PUT /blob/more/2  {prose 900}
	stop
`

// copyOfSample is the line of a script that makes the directory data a copy of a new sample.
func copyOfSample(t *testing.T) string {
	t.Helper()
	return "copy " + script(t, sample).path("data") + "  data"
}

// A directory that is whole has no defects, and check says how much it read.
func TestCheck(t *testing.T) {
	script(t, sample+`
		blobnom check data                 -> 0  ~4 shards, 8 blobs,   ~, 0 defects
		# Without an argument: the configured directory
		blobnom check                      -> 0  ~4 shards, 8 blobs,   ~, 0 defects
		# No configuration is needed
		blobnom check data  num_shards=no  -> 0
		# Chunks that are to be deleted
		sql data/shard_0.db  INSERT INTO orphans VALUES (9); INSERT INTO chunks VALUES (9 << 20, '')
		# A table of another tool
		sql data/shard_1.db  CREATE TABLE _litestream_seq (id INTEGER)
		blobnom check data                 -> 0  ~, 0 defects
		# A newer version is not damage
		sql data/shard_2.db  PRAGMA user_version = 7
		blobnom check data                 -> 1  ~schema version 7 is written by a newer version
		blobnom backup to                  -> 1  ~schema version 7 is written by a newer version
		blobnom migrate data  data_dir=to  -> 1  ~schema version 7 is written by a newer version
		ls .                               -> 1  data
	`)
}

// Each row changes a blob, and check names it.
func TestCheckBlobs(t *testing.T) {
	scriptRows(t, copyOfSample(t)+`
		sql {shard $1}      UPDATE blobs SET $2 WHERE key = '$1'
		blobnom check data  -> 1  ~{home $1}key "$1": the blob is damaged;   ~delete it: $3
	`, `
		small  data = zeroblob(size)            SHA-256
		small  size = size - 1                  chunk 0 of content 1 has 5000 bytes
		small  sha256 = zeroblob(32)            SHA-256
		small  sha256 = zeroblob(16)            a SHA-256 of 16 bytes
		small  codec = 9                        sql: Scan error
		small  updated_at = 'x'                 sql: Scan error
		small  id = -id, sha256 = zeroblob(32)  SHA-256
		text   data = zeroblob(stored)          inflated to 0 bytes instead of 5000
		text   crc32 = crc32 + 1                its CRC-32 is
		novel  stored = stored + 1              SHA-256
		empty  data = x'00', stored = 1         chunk 0 of content 1 has 1 bytes
	`)
}

// Each row changes a shard, and check says what is wrong with it.
func TestCheckShards(t *testing.T) {
	scriptRows(t, copyOfSample(t)+`
		sql data/shard_$1.db  $2
		blobnom check data    -> 1  ~shard $1: $3
	`, `
		0  UPDATE blobs SET key = 'smalls' WHERE id = 1       key "smalls": it belongs to shard 1
		0  UPDATE blobs SET key = CAST(x'ff' AS TEXT) WHERE id = 1  key "\xff": bad request: the key
		0  UPDATE chunks SET data = x'00' WHERE id & 3 = 1    key "large": the blob is damaged
		1  UPDATE chunks SET data = x'00' WHERE id & 3 = 3    key "novel": the blob is damaged
		0  DELETE FROM chunks WHERE id & 3 = 2                key "large": the blob is damaged
		0  INSERT INTO chunks VALUES (1 << 20, '')            chunk 0 of content 1 belongs to no
		0  INSERT INTO chunks VALUES (2 << 20 | 3, '')        chunk 3 of content 2 belongs to no
		0  INSERT INTO chunks VALUES (99 << 20, '')           chunk 0 of content 99 belongs to no
		2  DROP TABLE orphans                                 shard is corrupt: SQL logic error
		2  DELETE FROM meta                                   shard is corrupt: meta is incomplete
		2  PRAGMA application_id = 1                          shard is corrupt: its header is not
		2  PRAGMA user_version = 0                            shard is corrupt: application id
		2  UPDATE meta SET value = 1 << 40 WHERE value = 4    shard is corrupt: application id
		2  UPDATE meta SET value = 'x' WHERE key = 'directory'  it does not belong here: it is
	`)
}

// Each row gives the index of the expiring blobs the pages of another one.
func TestCheckIndex(t *testing.T) {
	scriptRows(t, strings.NewReplacer(
		"$ON", "PRAGMA writable_schema = ON",
		"$LAST", "(SELECT max(rootpage) FROM sqlite_schema)",
	).Replace(copyOfSample(t)+`
		sql data/shard_0.db  $1
		sql data/shard_0.db  CREATE INDEX more ON blobs (id) WHERE $2
		sql data/shard_0.db  $ON; UPDATE sqlite_schema SET rootpage = $LAST WHERE name = 'expiring'
		sql data/shard_0.db  $ON; DELETE FROM sqlite_schema WHERE name = 'more'
		blobnom check data   -> 1  ~shard 0: $3
	`), `
		UPDATE blobs SET expires_at = 1 << 50  id = 0  SQLite: row 1 missing from index expiring
		SELECT 0                               id > 0  index expiring has 3 rows instead of 0
	`)
}

// Each paragraph damages a page, takes a shard away or puts another one in its place.
func TestCheckFiles(t *testing.T) {
	scripts(t, copyOfSample(t), `
		# A torn page
		overwrite data/shard_2.db  4096  {noise 100}
		blobnom check data   -> 1  ~shard 2:

		# Several defects
		sql data/shard_0.db  UPDATE blobs SET sha256 = zeroblob(32) WHERE key = 'small'
		remove data/shard_2.db
		write data/shard_1.db
		blobnom check data   -> 1  ~key "small":   ~shard 1:   ~shard 2: the file is  ~3 defects

		# No database
		write data/shard_2.db   garbage
		blobnom check data   -> 1  ~shard 2:   ~not a database

		# An empty shard
		write data/shard_2.db
		blobnom check data   -> 1  ~shard 2: shard is corrupt: the file is missing or empty

		# A shard of the Rust server
		remove data/shard_2.db
		sql data/shard_2.db  CREATE TABLE blobs (key TEXT PRIMARY KEY, data BLOB)
		blobnom check data   -> 1  ~shard 2: shard is corrupt: its header is not that of a shard

		# A shard twice
		copy data/shard_2.db  data/shard_3.db
		blobnom check data   -> 1  ~shard 3: it does not belong here

		# A shard too many
		copy data/shard_2.db  data/shard_7.db
		sql data/shard_7.db  UPDATE meta SET value = 7 WHERE key = 'shard'
		blobnom check data   -> 1  ~shard 7: it does not belong here
	`)
}

// A blob that is replaced or deleted while check reads it is not damaged.
func TestCheckWhileBlobsChange(t *testing.T) {
	for _, change := range []string{
		"DELETE FROM blobs; DELETE FROM chunks",
		"UPDATE blobs SET id = id + 1; UPDATE chunks SET id = id + (1 << 20)",
	} {
		s := script(t, `
			serve  num_shards=1
			PUT    /blob/k  {noise 3C}
		`)
		source := noErr(openSource(s.path("data"), 0))
		defer source.close()
		var out bytes.Buffer
		checked := &dataDir{call: &call{stdout: &out}, first: source.record}
		fatal(t, source.eachRow(t.Context(), func(row storedRow) error {
			s.script("sql data/shard_0.db  BEGIN IMMEDIATE; " + change + "; COMMIT")
			return checked.checkBlob(row)
		}))
		expect(t, out.Len() == 0, "%s: check says %s", change, &out)
	}
}

// A shard that another program locks is not a damaged one.
func TestCheckOfLocked(t *testing.T) {
	t.Parallel() // it mostly waits
	s := script(t, sample+`
		hold data/shard_0.db  PRAGMA locking_mode = exclusive; BEGIN EXCLUSIVE; DELETE FROM blobs
	`)
	code, _, stderr := runCommand(t, nil, "check", s.path("data"))
	expect(t, code == 1, "code %d, want 1", code)
	expect(t, strings.Contains(stderr, "cannot check shard 0: too busy"), "it says %q", stderr)
}

// A directory is copied and checked while its server writes. A backup of the backup is the same.
func TestBackup(t *testing.T) {
	s := script(t, `
		serve  storage_compression=true
		PUT    /blob/small       {noise 100}
		PUT    /blob/large       {noise 10C}
		PUT    /blob/text        {prose 20000}  Content-Type: a/b
		PUT    /blob/text        {prose 30000}  Content-Type: a/b
		PUT    /blob/more?ttl=1h  {prose 3C}
	`)
	ctx, stop := context.WithCancel(t.Context())
	written := make(chan struct{})
	go func() {
		defer close(written)
		for ctx.Err() == nil {
			s.script(`
				PUT    /blob/a  {noise 2C}     -> 201
				PUT    /blob/b  {noise 20000}  -> 201
				PUT    /blob/a  {noise 100}    -> 201
				PUT    /blob/b  {noise 3C}     -> 201
				DELETE /blob/a                 -> 204
			`)
		}
	}()
	s.script(`
		blobnom backup  copy #1 100%                  -> 0  ~copied and verified
		blobnom check data                            -> 0  ~, 0 defects
	`)
	stop()
	<-written
	s.script(`
		blobnom check  copy #1 100%                   -> 0  ~, 0 defects
		blobnom backup second  data_dir=copy #1 100%  -> 0  ~copied and verified
		alike   copy #1 100%  second
		sql     second  SELECT auto_vacuum = 2 FROM pragma_auto_vacuum  -> 4
	`)
}

// A backup restores: data_dir may point at it, or its files are copied over a directory that
// crashed, whose WAL then counts no more.
func TestRestore(t *testing.T) {
	const backup = `
		clock   2026-01-02T03:04:05.678Z
		serve   num_shards=1
		PUT     /blob/text     {prose 30000}  Content-Type: a/b
		PUT     /blob/large    {noise 3C+5}
		clock   +1h
		blobnom backup to      -> 0
		stop
	`
	scripts(t, backup, `
		# data_dir points at it
		serve   num_shards=1  data_dir=to
		GET     /blob/text    -> 200  {prose 30000}  Content-Type: a/b
		GET     /blob/text    -> 200  Blob-Created: 2026-01-02T03:04:05.678Z
		PUT     /blob/new     x  -> 201
		sql     to  SELECT journal_mode = 'wal' FROM pragma_journal_mode  -> 1

		# It is copied over a directory with a WAL
		hold    live/shard_0.db  PRAGMA journal_mode = wal; CREATE TABLE t AS SELECT zeroblob(99999)
		copy    live               crashed
		copy    to/shard_0.db      crashed/shard_0.db
		copy    to/shard_0.db-wal  crashed/shard_0.db-wal
		serve   num_shards=1  data_dir=crashed
		GET     /blob/large   -> 200  {noise 3C+5}
		PUT     /blob/new     x  -> 201
	`)
}

// A backup has the damaged blobs of the original, and names them. A migration leaves them out,
// names them, and stays incomplete.
func TestCopyOfDamagedBlobs(t *testing.T) {
	setup := copyOfSample(t)
	scriptRows(t, setup+`
		sql {shard $1}      $2
		blobnom backup to   -> 1  ~{home $1}key "$1": the blob is damaged;
		blobnom check to    -> 1  ~{home $1}key "$1":   ~, 8 blobs,   ~, 1 defects
		blobnom migrate data  data_dir=new  -> 1  ~{home $1}key "$1": the blob is damaged;
		blobnom check new   -> 1  ~incomplete copy
	`, `
		small  UPDATE blobs SET sha256 = zeroblob(32) WHERE key = 'small'
		small  UPDATE blobs SET data = zeroblob(5000) WHERE key = 'small'
		text   UPDATE blobs SET sha256 = zeroblob(16) WHERE key = 'text'
		text   UPDATE blobs SET updated_at = 'x' WHERE key = 'text'
		large  UPDATE chunks SET data = zeroblob(length(data)) WHERE id & 3 = 1
		large  DELETE FROM chunks WHERE id & 3 = 1
	`)
	scripts(t, setup, `
		# How the commands end
		sql data/shard_0.db  UPDATE blobs SET sha256 = zeroblob(32) WHERE key = 'small'
		blobnom backup to    -> 1  ~, 1 damaged, as in the original  ~the copy is complete
		blobnom migrate data  data_dir=new  -> 1  ~new holds an incomplete copy: the copy lacks 1

		# A key in another shard than that of its hash is no damage of a content
		sql data/shard_0.db  UPDATE blobs SET key = 'smalls' WHERE key = 'small'
		blobnom backup to    -> 1  ~it belongs to shard 1  ~the copy has 1 defects, see above
		blobnom check to     -> 1  ~incomplete copy

		# A chunk of no blob is not copied, nor is anything else
		sql data/shard_0.db  INSERT INTO chunks VALUES (99 << 20, x'00')
		blobnom backup to    -> 1  ~chunk 0 of content 99 belongs to no blob  ~is damaged, see above
		ls to                -> 0
	`)
}

const (
	rustTable = "CREATE TABLE blobs (key TEXT PRIMARY KEY, data BLOB)"
	upTo300   = "WITH RECURSIVE n(i) AS (SELECT 1 UNION SELECT i + 1 FROM n LIMIT 300)"
)

// Nothing is copied of a shard with a damaged page: SQLite would leave rows out without an error.
// Each row copies a leaf of a table over another leaf.
func TestDamagedPages(t *testing.T) {
	made := script(t, strings.NewReplacer("TABLE", rustTable, "EACH", upTo300).Replace(`
		sql rust/shard_0.db  TABLE
		sql rust/shard_0.db  EACH INSERT INTO blobs SELECT i, zeroblob(900) FROM n
		blobnom migrate rust  num_shards=1  -> 0  ~300 blobs
	`))
	setup := fmt.Sprintf("copy %s  data\ncopy %s  rust", made.path("data"), made.path("rust"))
	scriptRows(t, setup+`
		leaf data/shard_0.db  $1  $2
		leaf rust/shard_0.db  $1  $2
		blobnom check data                 -> 1  ~SQLite:
		blobnom backup to                  -> 1  ~SQLite:   ~is damaged, see above
		blobnom migrate data  data_dir=to  -> 1  ~SQLite:   ~is damaged, see above
		blobnom migrate rust  data_dir=to  -> 1  ~SQLite:   ~is damaged, see above
		ls to                              -> 0
	`, `
		blobs 2   blobs 14
		blobs 2   blobs 9
		blobs 9   blobs 2
		blobs 0   blobs 1
		blobs 14  blobs 0
	`)
}

// A table that looks empty is no empty table, and a chunk that a page hides is no missing chunk.
func TestHiddenRows(t *testing.T) {
	scriptRows(t, copyOfSample(t)+`
		leaf data/shard_$1.db  orphans 0  $2 0
		blobnom backup to                  -> 1  ~shard $1: SQLite:   ~is damaged, see above
		blobnom migrate data  data_dir=to  -> 1  ~shard $1: SQLite:   ~is damaged, see above
		ls to                              -> 0
	`, `
		1  blobs
		0  chunks
	`)
}

// A defect that the copy alone has is no damage of the original.
func TestDamagedCopy(t *testing.T) {
	s := script(t, sample+`
		blobnom backup to  -> 0  ~copied and verified
		sql to/shard_0.db  UPDATE blobs SET sha256 = zeroblob(32) WHERE key = 'small'
	`)
	cli := &call{stdout: io.Discard}
	original := noErr(cli.listDir(s.path("data")))
	copied := noErr(cli.listDir(s.path("to")))
	fatal(t, copied.check(t.Context()))
	err := copied.compareDamage(original)
	want := `key "small" is whole in the original, or has changed; run backup again`
	expect(t, err != nil && err.Error() == want, "%v, want %s", err, want)
}

// A copy goes where nothing is, or over what an interrupted one left. Nobody else may read it.
func TestCopyTargets(t *testing.T) {
	setup := copyOfSample(t)
	for _, command := range []string{"backup to", "migrate data  data_dir=to"} {
		scripts(t, setup, strings.ReplaceAll(`
			# A new directory
			blobnom COPY  -> 0  ~8 blobs
			alike  data  to
			mode   to                  -> drwx------
			mode   to/shard_0.db       -> -rw-------
			mode   to/shard_3.db-wal   -> -rw-------
			keep   to
			blobnom COPY  -> 1  ~it is not empty, shard_0.db is in the way
			same   to

			# What an interrupted copy left
			write  to/blobnom.partial
			write  to/blobnom.lock
			write  to/blobnom.new      left
			write  to/blobnom.reserve  left
			write  to/shard_0.db       left
			write  to/shard_0.db-wal   left
			write  to/shard_7.db       left
			blobnom COPY  -> 0  ~8 blobs
			alike  data  to
			remove to/shard_0.db-shm  to/shard_1.db-shm  to/shard_2.db-shm  to/shard_3.db-shm
			ls     to     -> 9  ~blobnom.lock shard_0.db shard_0.db-wal shard_1.db shard_1.db-wal

			# A lock, of a copy that was killed before it wrote its marker
			write  to/blobnom.lock
			blobnom COPY  -> 0  ~8 blobs
			alike  data  to
		`, "COPY", command))
	}
	scriptRows(t, setup+`
		write   to/$1  mine
		keep    to
		blobnom backup to                  -> 1  ~it is not empty, $1 is in the way
		blobnom migrate data  data_dir=to  -> 1  ~it is not empty, $1 is in the way
		same    to
	`, `
		diary.txt
		.hidden
		shard_0.db
		blobnom.partial2
	`)
}

// An incomplete copy is refused by every command.
func TestIncompleteCopy(t *testing.T) {
	script(t, copyOfSample(t)+`
		blobnom backup to                  -> 0
		write   to/blobnom.partial
		keep    to
		blobnom check to                   -> 1  ~to is an incomplete copy: run the interrupted
		blobnom backup to2  data_dir=to    -> 1  ~to is an incomplete copy
		blobnom migrate to  data_dir=to2   -> 1  ~to is an incomplete copy
		blobnom serve  data_dir=to         -> 1  ~to is an incomplete copy
		serve   data_dir=to                -> refused  ~to is an incomplete copy
		same    to
		ls      .                          -> 2  data to
	`)
}

// Of two copies into one directory at a time one is refused. What the other completes stays whole.
func TestCopiesMeet(t *testing.T) {
	s := script(t, copyOfSample(t)+`
		blobnom backup to  -> 0
		keep    to
	`)
	// The second command has seen a marker, and waited for the lock until the first was done.
	err := startOver(s.path("to"))
	expect(t, err != nil && strings.Contains(err.Error(), "not empty"), "%v, want: not empty", err)
	s.script(`
		same    to
		write   to/blobnom.partial
		hold    to/blobnom.lock  PRAGMA journal_mode = off; BEGIN EXCLUSIVE; PRAGMA user_version = 1
		blobnom backup to                  -> 1  ~in use by another blobnom
		blobnom migrate data  data_dir=to  -> 1  ~in use by another blobnom
		remove  to/blobnom.partial
		same    to
		alike   data  to
	`)
}

// A Rust server that was killed in the middle of a checkpoint leaves a database that is whole only
// together with its WAL.
func TestMigrateHalfACheckpoint(t *testing.T) {
	script(t, `
		hold    live/shard_0.db  PRAGMA journal_mode = WAL; CREATE TABLE blobs (key TEXT PRIMARY KEY, data BLOB)
		sql     live/shard_0.db  INSERT INTO blobs VALUES ('k', zeroblob(9000))
		copy    live  rust
		# The checkpoint has written the number of pages into the file, and not yet the pages.
		overwrite rust/shard_0.db  28  `+"\x00\x00\x00\x40"+`
		blobnom migrate rust  data_dir=to  num_shards=1  -> 0  ~1 blobs
	`)
}

// What cannot be copied or checked is refused at once, and nothing is made.
func TestRefusals(t *testing.T) {
	script(t, `
		serve  num_shards=1
		sql    rust/shard_0.db   CREATE TABLE blobs (key TEXT PRIMARY KEY, data BLOB)
		sql    songs/shard_0.db  CREATE TABLE songs (title)
		copy   rust              gap
		copy   rust/shard_0.db   gap/shard_2.db
		sql    headless/shard_1.db  CREATE TABLE blobs (key TEXT PRIMARY KEY, data BLOB)
		write  empty/diary.txt
		keep   rust
		blobnom check empty                   -> 1  ~holds no shards
		blobnom check to                      -> 1  ~cannot read
		blobnom check rust                    -> 1  ~run: blobnom migrate rust
		blobnom backup to     data_dir=empty  -> 1  ~holds no shards
		blobnom backup to     data_dir=to2    -> 1  ~cannot read
		blobnom backup to     data_dir=rust   -> 1  ~run: blobnom migrate rust
		blobnom backup data/shard_0.db        -> 1  ~cannot copy into
		blobnom backup data/shard_0.db/b      -> 1  ~cannot copy into
		blobnom backup data                   -> 1  ~not empty
		blobnom migrate empty     data_dir=to   -> 1  ~holds no shards
		blobnom migrate to2       data_dir=to   -> 1  ~cannot read
		blobnom migrate data      data_dir=to   -> 1  ~in use by another blobnom
		blobnom migrate songs     data_dir=to   -> 1  ~no such table: blobs
		blobnom migrate gap       data_dir=to   -> 1  ~shard 1 of gap is missing
		blobnom migrate headless  data_dir=to   -> 1  ~shard 0 of headless is missing
		blobnom migrate rust      data_dir=rust -> 1  ~not empty
		blobnom migrate rust      data_dir=to  hash=md5  -> 2  ~md5
		same   rust
		ls     .  -> 6  data empty gap headless rust songs
	`)
}

// Shards of ours that do not belong together are refused at once, by the number in the file's name.
func TestMixedShards(t *testing.T) {
	setup := copyOfSample(t)
	const commands = `
		blobnom backup to                  -> 1  ~shard $1 of   ~data: $2
		blobnom migrate data  data_dir=to  -> 1  ~shard $1 of   ~data: $2
		ls to                              -> 0
	`
	scriptRows(t, setup+`
		remove data/shard_$1.db
		sql rust.db  CREATE TABLE blobs (key TEXT PRIMARY KEY, data BLOB)
		copy $3  data/shard_$1.db
	`+commands, `
		2  it does not belong here  `+script(t, sample).path("data/shard_2.db")+`
		7  it does not belong here  data/shard_2.db
		3  shard is corrupt: its header is not that of a shard  rust.db
	`)
	scriptRows(t, setup+`
		remove data/shard_$1.db
	`+strings.ReplaceAll(commands, ": $2", " is missing; restore it from a backup"), `
		0
		2
		3
	`)
}

// A copy that is killed or interrupted leaves nothing that passes for whole. The next run completes
// it, whichever command that is.
func TestCopyKilled(t *testing.T) {
	t.Parallel()
	s := script(t, `
		serve  num_shards=2
		PUT    /blob/k0  {noise 32C}
		PUT    /blob/k1  {noise 32C+1}
		PUT    /blob/k2  {noise 32C+2}
		stop
	`)
	data := s.path("data")
	to := s.path("to")
	backup := []string{data, "backup", to}
	migrate := []string{to, "migrate", data}
	for _, row := range []struct {
		signal       os.Signal
		killed, next []string
	}{
		{os.Kill, backup, migrate},
		{os.Kill, migrate, backup},
		{os.Interrupt, backup, backup},
		{os.Interrupt, migrate, migrate},
		{syscall.SIGTERM, backup, backup},
		{syscall.SIGTERM, migrate, migrate},
	} {
		var said string
		eventually(t, "a signal comes in time", func() bool {
			said = interruptCopy(t, row.killed, row.signal, to)
			return fileExists(filepath.Join(to, partialFile))
		})
		want := "blobnom: interrupted; " + to + " holds an incomplete copy; " +
			"run the same command again, it starts over\n"
		isRight := said == want || row.signal == os.Kill
		expect(t, isRight, "%v of %s: it says %q, want %q", row.signal, row.killed, said, want)
		env := []string{"BLOBNOM_NUM_SHARDS=2", "BLOBNOM_DATA_DIR=" + row.next[0]}
		code, _, stderr := runCommand(t, env, row.next[1:]...)
		expect(t, code == 0, "%s after %s: code %d, %s", row.next, row.killed, code, stderr)
		s.script("alike data  to")
	}
}

// interruptCopy starts the program in a directory, ends it by a signal as soon as it has written a
// part of the copy, and returns what it printed.
func interruptCopy(t *testing.T, args []string, signal os.Signal, to string) string {
	t.Helper()
	fatal(t, os.RemoveAll(to))
	cmd := asBlobnom(t, exec.Command(os.Args[0], args[1:]...), args[0], "BLOBNOM_NUM_SHARDS=2")
	var said bytes.Buffer
	cmd.Stdout = &said
	cmd.Stderr = &said
	fatal(t, cmd.Start())
	shard := filepath.Join(to, shardName(0))
	eventually(t, "a part is copied", func() bool {
		return max(sizeOf(shard), sizeOf(shard+"-wal")) > 1<<20
	})
	fatal(t, cmd.Process.Signal(signal))
	cmd.Wait()
	return said.String()
}

// watch records which files of directories are opened or removed.
func watch(t *testing.T, dirs ...string) *os.File {
	t.Helper()
	calls := map[string][]uintptr{
		"linux/amd64": {294, 254},
		"linux/arm64": {26, 27},
	}[runtime.GOOS+"/"+runtime.GOARCH]
	if calls == nil {
		skip(t, "there is no inotify on %s", runtime.GOOS)
	}
	const opened, removed = 0x20, 0x200
	fd, _, failed := syscall.RawSyscall(calls[0], syscall.O_NONBLOCK, 0, 0)
	if failed != 0 {
		t.Fatalf("inotify_init1: %v", failed)
	}
	for _, dir := range dirs {
		path := noErr(syscall.BytePtrFromString(dir))
		syscall.RawSyscall(calls[1], fd, uintptr(unsafe.Pointer(path)), opened|removed)
	}
	return os.NewFile(fd, "watch")
}

// partialCopy is a copy that only lacks to be synced, and to lose its marker.
func partialCopy(t *testing.T) (*testServer, *dataDir) {
	t.Helper()
	s := script(t, `
		serve  num_shards=1
		PUT    /blob/k  {noise 3C}
		stop
		blobnom backup to  num_shards=1  -> 0
		write  to/blobnom.partial
		keep   to
	`)
	cli := &call{stdout: io.Discard}
	return s, noErr(cli.listDir(s.path("to")))
}

// The marker of a copy is synced before anything is removed, and the copy before its marker goes.
// Where a sync fails, nothing goes.
func TestFailedSyncOfCopy(t *testing.T) {
	s, copied := partialCopy(t)
	broken := []string{"fsync", "EIO"}
	whileBroken(t, broken, func() error {
		s.script("blobnom backup to  num_shards=1  -> 1  ~sync to: input/output error")
		return nil
	})
	s.script("same to")
	err := whileBroken(t, broken, copied.completeCopy)
	expect(t, errors.Is(err, syscall.EIO), "%v, want %v", err, syscall.EIO)
	s.script("same to")
}

// The files of a copy are synced, their directory and the one above, and then the marker goes.
func TestOrderOfSyncs(t *testing.T) {
	s, copied := partialCopy(t)
	events := watch(t, copied.path, s.dir)
	fatal(t, copied.completeCopy())
	data := make([]byte, 10_000)
	n := noErr(events.Read(data))
	steps := ""
	for event := data[:n]; len(event) > 0; {
		length := binary.NativeEndian.Uint32(event[12:])
		name := string(bytes.TrimRight(event[16:16+length], "\x00"))
		steps += []string{" to/", " ./"}[event[0]-1] + name
		event = event[16+length:]
	}
	const want = " to/shard_0.db-wal" + // is created
		" ./to to/ ./ to/shard_0.db to/shard_0.db-wal" +
		" to/blobnom.partial ./to to/" // is removed, and that is synced
	expect(t, steps == want, "opened and removed:%s, want:%s", steps, want)
}

// A check that is interrupted says that nothing was changed.
func TestCheckInterrupted(t *testing.T) {
	s := script(t, sample)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	var stderr bytes.Buffer
	code := run(ctx, []string{"check", s.path("data")}, nil, io.Discard, &stderr)
	const want = "blobnom: interrupted; nothing was changed; run the same command again, " +
		"it starts over\n"
	expect(t, code == 1, "code %d, want 1", code)
	expect(t, stderr.String() == want, "it says %q, want %q", &stderr, want)
}

// A person at a terminal sees every half second how far the work is. What the command prints stands
// on lines of its own.
func TestProgress(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var screen bytes.Buffer
		cli := &call{stdout: &screen, stderr: &screen}
		cli.showProgress()
		time.Sleep(600 * time.Millisecond)
		cli.progress.startTask("checking", "shard_0.db", 1, 2)
		time.Sleep(500 * time.Millisecond)
		cli.progress.setDone("4 blobs")
		cli.progress.setDone("5 blobs")
		time.Sleep(1000 * time.Millisecond)
		fmt.Fprintln(cli.stdout, "a result")
		cli.progress.startTask("checking", "shard_1.db", 2, 2)
		time.Sleep(500 * time.Millisecond)
		cli.progress.hide()
		time.Sleep(time.Hour)
		fmt.Fprintln(cli.stderr, "the end")
		want := strings.ReplaceAll("CLEARstarting, 0 s"+
			"CLEARchecking shard_0.db, 1 of 2, 1 s"+
			"CLEARchecking shard_0.db, 1 of 2, 5 blobs, 2 s"+
			"CLEARchecking shard_0.db, 1 of 2, 5 blobs, 2 s"+
			"CLEARa result\n"+
			"CLEARchecking shard_1.db, 2 of 2, 2 s"+
			"CLEARthe end\n", "CLEAR", "\r\x1b[K")
		expect(t, screen.String() == want, "it shows %q, want %q", &screen, want)
	})
	expect(t, !isTerminal(&bytes.Buffer{}), "a buffer is a terminal")
	file := noErr(os.Create(filepath.Join(t.TempDir(), "f")))
	defer file.Close()
	expect(t, !isTerminal(file), "a file is a terminal")
}

// A copy may go into a mount point. One that finds no room there fails, and says that it is
// incomplete.
func TestCopyDiskFull(t *testing.T) {
	for _, command := range []string{"backup MOUNT", "migrate data  data_dir=MOUNT"} {
		lines := strings.ReplaceAll(`
			serve  num_shards=1
			PUT    /blob/k0  {noise 10C}
			stop
			blobnom COPY         num_shards=1  -> 0  ~1 blobs
			write  MOUNT/blobnom.partial
			serve  num_shards=1
			PUT    /blob/k1  {noise 80C}
			stop
			blobnom COPY         num_shards=1  -> 1  ~disk full
			blobnom check MOUNT                -> 1  ~incomplete copy
		`, "COPY", command)
		script(t, strings.ReplaceAll(lines, "MOUNT", mount(t, "16m")))
	}
	// There is not even room for the shards.
	tiny := mount(t, "128k")
	script(t, sample+"blobnom migrate data  data_dir="+tiny+"  -> 1  ~disk full")
}

// A directory of the Rust server comes over byte for byte, and stays as it is. That server may have
// been killed: rows are in a WAL alone, with or without its index.
func TestMigrateRust(t *testing.T) {
	script(t, strings.NewReplacer(
		"TABLE", rustTable,
		"EACH", upTo300,
	).Replace(`
		hold live/shard_0.db  PRAGMA journal_mode = wal; TABLE
		hold live/shard_1.db  PRAGMA journal_mode = wal; TABLE
		sql  live/shard_2.db  PRAGMA journal_mode = wal; TABLE
		sql  live/shard_0.db  EACH INSERT INTO blobs SELECT 'many/' || i, 'of many/' || i FROM n
		sql  live/shard_0.db  INSERT INTO blobs VALUES ('1', NULL), ('2', ''), ('ü/ä', x'c3bc')
		hold live/shard_0.db  PRAGMA wal_checkpoint(TRUNCATE)
		sql  live/shard_0.db  INSERT INTO blobs VALUES ('''";-- ', x'00ff')
		sql  live/shard_0.db  INSERT INTO blobs VALUES ('//../x', 'v'), (char(1), 'v')
		sql  live/shard_1.db  INSERT INTO blobs VALUES ('1C-1', printf('%.*c', 262143, 'x'))
		sql  live/shard_1.db  INSERT INTO blobs VALUES ('1C', printf('%.*c', 262144, 'x'))
		sql  live/shard_2.db  INSERT INTO blobs VALUES ('1C+1', printf('%.*c', 262145, 'x'))
		sql  live/shard_2.db  INSERT INTO blobs VALUES ('100C', printf('%.*c', 26214400, 'x'))
		copy live  data
		remove data/shard_1.db-shm
		keep data
		blobnom migrate data  data_dir=to  storage_compression=true  max_blob_bytes=10  -> 0
		same data
		blobs to  -> 310  ~["1",{tag },0,0,"application/octet-stream"  ~["2",{tag },0,0,
		blobs to  -> 310  ~["ü/ä",{tag ü}  ~["//../x",{tag v}  ~["\u0001",{tag v}
		blobs to  -> 310  ~["1C-1",{tag {repeat 1C-1 x}}  ~["1C",{tag {repeat 1C x}}
		blobs to  -> 310  ~["1C+1",{tag {repeat 1C+1 x}}  ~["100C",{tag {repeat 100C x}}
		sql   to  SELECT count(*) FROM blobs WHERE key = '''";-- ' AND data = x'00ff'     -> 1
		sql   to  SELECT count(*) FROM blobs WHERE data = CAST('of ' || key AS BLOB)  -> 300
	`))
}

// Every row of the Rust server counts, in whichever shard. Keys that are not copied are named.
func TestMigrateRows(t *testing.T) {
	setup := ""
	for i := range 4 {
		setup += fmt.Sprintf("sql data/shard_%d.db  %s\n", i, rustTable)
	}
	scripts(t, setup, `
		# Other columns and tables
		remove data/shard_0.db
		sql data/shard_0.db  CREATE TABLE blobs (a, key TEXT, b AS (length(key)), data, expires_at)
		sql data/shard_0.db  INSERT INTO blobs (a, key, data, expires_at) VALUES (1.5, 'k', 'v', 1)
		sql data/shard_0.db  CREATE TABLE meta AS SELECT 'not me' AS key, 'v' AS data
		blobnom migrate data  data_dir=to  -> 0  ~1 blobs
		blobs to  -> 1  ~["k",{tag v},1,0,"application/octet-stream"  ~,null]

		# Keys in another shard than that of their hash wait for no batch
		sql data/shard_0.db  INSERT INTO blobs VALUES ('lost', 'v'), ('twice', 'v')
		blobnom migrate data  data_dir=to  batch_timeout_ms=60000  -> 0  ~; found twice: 0
		blobs to  -> 2  ~["lost",{tag v}  ~["twice",{tag v}

		# Of a key found twice the copy in the shard of its hash is taken
		sql data/shard_0.db  INSERT INTO blobs VALUES ('twice', 'wrong')
		sql data/shard_2.db  INSERT INTO blobs VALUES ('twice', 'wrong')
		sql data/shard_3.db  INSERT INTO blobs VALUES ('twice', 'right')
		blobnom migrate data  data_dir=to  -> 0  ~shard 0: key "twice":   ~shard 2: key "twice":
		blobs to  -> 1  ~["twice",{tag right}

		# A key found twice, and not in the shard of its hash
		sql data/shard_0.db  INSERT INTO blobs VALUES ('twice', 'same')
		sql data/shard_1.db  INSERT INTO blobs VALUES ('twice', 'same')
		blobnom migrate data  data_dir=to  -> 0  ~shard 1: key "twice": not taken, there  ~ twice: 1
		blobs to  -> 1  ~["twice",{tag same}

		# A key found twice in one shard
		sql data/shard_3.db  INSERT INTO blobs VALUES ('same', 'x'), (CAST('same' AS BLOB), 'y')
		blobnom migrate data  data_dir=to  -> 1  ~2 blobs were copied, 1 are there
		blobnom check to  -> 1  ~incomplete copy

		# A key that is NULL
		sql data/shard_1.db  INSERT INTO blobs VALUES ('good', 'x'), (NULL, 'x')
		blobnom migrate data  data_dir=to  -> 1  ~shard 1: key "": bad request:   ~lacks 1 blobs
		blobnom check to  -> 1  ~incomplete copy

		# Keys that are refused
		sql data/shard_0.db  INSERT INTO blobs VALUES ('', ''), ('{repeat 1025 k}', '')
		sql data/shard_1.db  INSERT INTO blobs VALUES (CAST(x'ff' AS TEXT), ''), ('good', '')
		sql data/shard_2.db  INSERT INTO blobs VALUES (CAST(x'6100' AS TEXT), '')
		blobnom migrate data  data_dir=to  -> 1  ~key "":   ~key "k  ~key "\xff":   ~key "a\x00":
		blobnom check to  -> 1  ~incomplete copy
	`)
}

// An empty database is not opened: that would delete the WAL beside it.
func TestEmptyDatabase(t *testing.T) {
	script(t, `
		hold live/shard_0.db  PRAGMA journal_mode = wal; CREATE TABLE blobs (key, data)
		copy live  data
		write data/shard_0.db
		keep data
		blobnom check data                 -> 1  ~missing or empty
		blobnom backup to                  -> 1  ~missing or empty
		blobnom migrate data  data_dir=to  -> 1  ~missing or empty
		serve num_shards=1                 -> refused
		remove data/blobnom.lock
		same data
		ls .                               -> 2  data live
	`)
}

// From one shape to another and back nothing changes. What has expired comes over, too: the server
// deletes it.
func TestReshard(t *testing.T) {
	script(t, `
		clock 2026-01-02T03:04:05.678Z
		serve storage_compression=true
		PUT   /blob/empty           ""
		PUT   /blob/small           {prose 5000}   Content-Type: text/plain
		PUT   /blob/small           {noise 5000}   Content-Type: text/html
		PUT   /blob/more?ttl=1h     {prose 20000}
		PUT   /blob/chunk           {noise 1C}
		PUT   /blob/large?ttl=2h    {noise 3C+5}   Content-Type: image/png
		PUT   /blob/novel           {prose 3C+5}   Content-Type: text/css
		PUT   /blob/a%20b           1
		PUT   /blob/%27%22;--       2
		PUT   /blob/100%25%3F%23    3
		PUT   /blob/%01%7F          4
		PUT   /blob/%2F%2F..%2Fx    5
		PUT   /blob/%C3%BC/%E6%97%A5  6
		stop
		keep  data
		blobnom migrate data  data_dir=b  num_shards=7                -> 0  ~, 12 blobs,
		blobnom migrate b  data_dir=c  num_shards=3  hash=sha256  storage_compression=true  -> 0
		blobnom migrate c  data_dir=d  num_shards=1  hash=crc32c      -> 0
		same  data
		alike data  b
		alike data  c
		alike data  d
		sql   d/shard_0.db  UPDATE blobs SET expires_at = 1 WHERE key = 'small'
		blobnom migrate d  data_dir=e  storage_compression=true       -> 0  ~, 12 blobs,
		alike d  e
		serve data_dir=e
		GET   /blob/novel           -> 200  {prose 3C+5}  Content-Type: text/css
		GET   /blob/small           -> 404
		GET   /blob/%01%7F          -> 200  4
	`)
	script(t, copyOfSample(t)+`
		# A blob that has expired counts as well when its key is found twice
		sql   data/shard_0.db  UPDATE blobs SET expires_at = 1 WHERE key = 'small'
		sql   data/shard_1.db  UPDATE blobs SET key = 'small' WHERE key = 'more/2'
		blobnom migrate data  data_dir=to  -> 0  ~shard 1: key "small": not taken  ~ twice: 1
		blobs to  -> 7  ~["small",{tag {noise 5000}}
	`)
}

// ============================================================================
// All together
// ============================================================================

// TestModel compares servers of several configurations with a map, over random operations.
func TestModel(t *testing.T) {
	if *seed == 0 {
		*seed = rand.Uint64()
	}
	t.Logf("-seed %d", *seed)
	steps := 500
	if testing.Short() {
		steps = 150
	}
	for i := range 8 {
		t.Run(fmt.Sprint(i), func(t *testing.T) {
			t.Parallel() // it waits for the disk
			m := newModel(t, i)
			for step := 0; step < steps && !t.Failed(); step++ {
				m.step()
			}
			m.script("stop")
			m.verify()
		})
	}
}

// newModel starts the server of model i, whose bits are options.
func newModel(t *testing.T, i int) *model {
	m := &model{
		testServer: script(t, "clock 2026-01-02T03:04:05.678Z"),
		rnd:        rand.New(rand.NewPCG(*seed, uint64(i))),
		blobs:      map[string]*modelBlob{},
		isDeflated: i&4 == 0,
	}
	hash := []string{"fnv1a", "crc32c", "sha256"}[i%3]
	m.settings = fmt.Sprintf("num_shards=%d  hash=%s", 1+i&2, hash)
	m.settings += fmt.Sprintf("  async_write=%v  output_compression=%v", i&1 != 0, i&4 != 0)
	m.start()
	return m
}

// pick returns one of the values.
func pick[T any](random func(n int) int, values ...T) T { return values[random(len(values))] }

// model is a server and the map it is to agree with.
type model struct {
	*testServer
	settings   string
	isDeflated bool // the last run had storage_compression
	rnd        *rand.Rand
	blobs      map[string]*modelBlob // those that have expired, too
}

type modelBlob struct {
	body             []byte
	version          int
	created, expires int64
}

// start starts the server, with other values of what may change between two runs.
func (m *model) start() {
	m.isDeflated = !m.isDeflated
	m.script(fmt.Sprintf(
		"serve  %s  storage_compression=%v  durability=%s  batch_size=%d  batch_timeout_ms=%d",
		m.settings,
		m.isDeflated,
		pick(m.rnd.IntN, "full", "normal", "off"),
		1+m.rnd.IntN(8),
		m.rnd.IntN(3)))
}

// chance is true once in n times.
func (m *model) chance(n int) bool { return m.rnd.IntN(n) == 0 }

// live returns what is to be under key, nil for nothing.
func (m *model) live(key string) *modelBlob {
	b := m.blobs[key]
	if b == nil || b.expires != 0 && b.expires <= m.clock.ms.Load() {
		return nil
	}
	return b
}

// step does one operation on both.
func (m *model) step() {
	m.t.Helper()
	operations := []func(key string, b *modelBlob){
		m.write, m.write, m.write, m.write, m.delete,
		m.read, m.read, m.read, m.readRange, m.readGzip,
		m.readList, m.restart,
	}
	key := fmt.Sprint("key/", m.rnd.IntN(12))
	operation := pick(m.rnd.IntN, operations...)
	operation(key, m.live(key))
}

func (m *model) write(key string, b *modelBlob) {
	next := &modelBlob{body: m.content(), created: m.clock.ms.Load()}
	path := "/blob/" + key
	if m.chance(3) {
		ttl := 1 + m.rnd.Int64N(60)
		path += fmt.Sprintf("?ttl=%d", ttl)
		next.expires = next.created + ttl*1000
	}
	if b != nil {
		next.version = b.version + 1
		next.created = b.created
	}
	body := io.Reader(bytes.NewReader(next.body))
	if m.chance(2) {
		body = unknownLength(next.body)
	}
	if m.isDone(b, 201, "PUT", path, body) {
		m.blobs[key] = next
	}
}

// content returns noise or prose. One in four is at the edge of a chunk, of a row, or empty.
func (m *model) content() []byte {
	size := m.rnd.IntN(pick(m.rnd.IntN, 100, 20_000, 4*chunkSize))
	if m.chance(4) {
		const C = chunkSize
		size = pick(m.rnd.IntN, 0, 1, C-1, C, C+1, 2*C, 5*C+7)
	}
	if m.chance(2) {
		return noise(size, m.rnd.Uint64())
	}
	return prose(size, m.rnd.Uint64())
}

func (m *model) delete(key string, b *modelBlob) {
	if m.isDone(b, 204, "DELETE", "/blob/"+key, nil) {
		delete(m.blobs, key)
	}
}

// isDone sends a write of b, perhaps with a condition, and reports whether it is done. It fails
// unless the answer is right: this status if it is committed.
func (m *model) isDone(b *modelBlob, status int, method, path string, body io.Reader) bool {
	m.t.Helper()
	headers := []string{"Content-Type", "text/plain"}
	if m.chance(3) {
		condition, tag, holds := m.condition(b)
		headers = append(headers, condition, tag)
		if !holds {
			status = 412
		}
	} else if m.store.async {
		status = 202
	}
	resp, text, err := m.do(method, path, body, headers...)
	fatal(m.t, err)
	if resp.StatusCode != status {
		m.t.Fatalf("%s %s %q: %s %s, want %d", method, path, headers, resp.Status, text, status)
	}
	return status != 412
}

// condition returns a random precondition, and whether it holds for b.
func (m *model) condition(b *modelBlob) (name, tag string, holds bool) {
	tag = pick(m.rnd.IntN, `"other"`, "*")
	isMatch := b != nil && tag == "*"
	if b != nil && m.chance(2) {
		gzipTag := brace("gzip-tag", string(b.body))
		tag = pick(m.rnd.IntN, tagOf(b.body), gzipTag)
		isMatch = true
	}
	if m.chance(2) {
		return "If-Match", tag, isMatch
	}
	return "If-None-Match", tag, !isMatch
}

func (m *model) read(key string, b *modelBlob) {
	m.t.Helper()
	if b == nil {
		m.want(404, "GET", "/blob/"+key, nil)
		return
	}
	expires := ""
	if b.expires != 0 {
		expires = stamp(b.expires)
	}
	m.wantBlob(key, b.body,
		"Blob-Version", strconv.Itoa(b.version),
		"Blob-Created", stamp(b.created),
		"Blob-Expires", expires,
		"Etag", tagOf(b.body))
}

func (m *model) readRange(key string, b *modelBlob) {
	m.t.Helper()
	if b == nil || len(b.body) == 0 {
		return
	}
	from := m.rnd.IntN(len(b.body))
	to := min(from+m.rnd.IntN(chunkSize), len(b.body)-1)
	asked := fmt.Sprintf("bytes=%d-%d", from, to)
	_, got := m.want(206, "GET", "/blob/"+key, nil, "Range", asked)
	want := b.body[from : to+1]
	expect(m.t, bytes.Equal(got, want), "%s of %s: %.40q", asked, key, got)
}

func (m *model) readGzip(key string, b *modelBlob) {
	m.t.Helper()
	if b == nil {
		return
	}
	resp, got := m.want(200, "GET", "/blob/"+key, nil, "Accept-Encoding", "gzip")
	if resp.Header.Get("Content-Encoding") == "gzip" {
		got = unzip(m.t, got)
	}
	expect(m.t, bytes.Equal(got, b.body), "%s with gzip: %.40q, want %.40q", key, got, b.body)
}

// readList compares the listing. That also waits for what is queued, before the time changes.
func (m *model) readList(string, *modelBlob) {
	m.t.Helper()
	var want []string
	for key := range m.blobs {
		if m.live(key) != nil {
			want = append(want, key)
		}
	}
	slices.Sort(want)
	got := m.listAll("key/", 1+m.rnd.IntN(12))
	expect(m.t, slices.Equal(got, want), "listed %q, want %q", got, want)
	m.clock.advance(time.Duration(m.rnd.IntN(20)) * time.Second)
}

func (m *model) restart(string, *modelBlob) {
	if m.chance(5) {
		m.script("stop")
		m.start()
	}
}

// verify compares the map with the directory of the stopped server.
func (m *model) verify() {
	sums := verifyDir(m.t, m.path("data"))
	for key := range m.blobs {
		b := m.live(key)
		if b != nil {
			got := sums[key]
			expect(m.t, got == sumOf(b.body), "%s has SHA-256 %q", key, got)
		}
	}
}

// written is what is known of a key that is written until the program ends: the SHA-256 of what the
// last answered write left under it, and of what was sent last. "" is no blob.
type written struct {
	path, answered, sent string
	largest              int // of the contents, in bytes
}

// writeUntil writes over 16 connections until the program ends by a line of a script. After a
// restart every answered write is there, whole, or a later one that was under way.
func (s *testServer) writeUntil(end, about string, blobs []written) {
	s.t.Helper()
	var answers atomic.Int64
	var writers sync.WaitGroup
	for own := range slices.Chunk(blobs, 4) {
		writers.Go(func() {
			for own[rand.IntN(len(own))].write(s) {
				answers.Add(1)
			}
		})
	}
	enough := 100 + rand.Int64N(300)
	eventually(s.t, "many writes are answered", func() bool {
		return answers.Load() >= enough || s.t.Failed()
	})
	s.script(end)
	writers.Wait()
	s.script("start")
	for i := range blobs {
		blobs[i].verify(s, about)
	}
	s.script(`
		wait sql data  SELECT count(*) FROM orphans  -> 0
		kill TERM  -> 0
	`)
}

func newWritten(largest int) []written {
	blobs := make([]written, 64)
	for i := range blobs {
		blobs[i] = written{path: fmt.Sprintf("/blob/%d", i), largest: largest}
	}
	return blobs
}

// write replaces or deletes the blob, and reports whether that was answered.
func (b *written) write(s *testServer) bool {
	b.sent = ""
	method := "DELETE"
	var body []byte
	if rand.IntN(5) > 0 {
		method = "PUT"
		size := pick(rand.IntN, 0, 100, 4096, rand.IntN(b.largest))
		content := pick(rand.IntN, noise, prose)
		body = content(size, rand.Uint64())
		b.sent = sumOf(body)
	}
	resp, text, err := s.do(method, b.path, bytes.NewReader(body))
	if err != nil || resp.StatusCode == 503 {
		return false // the program was killed, or stops
	}
	expect(s.t, resp.StatusCode < 300, "%s %s: %s %s", method, b.path, resp.Status, text)
	b.answered = b.sent
	return resp.StatusCode < 300
}

// verify reads the blob after the restart.
func (b *written) verify(s *testServer, about string) {
	s.t.Helper()
	resp, body, err := s.do("GET", b.path, nil)
	fatal(s.t, err)
	got := resp.Status
	switch resp.StatusCode {
	case 200:
		got = sumOf(body)
	case 404:
		got = ""
	}
	expect(s.t, got == b.answered || got == b.sent,
		"%s: %s is %q, answered was %q, and sent %q", about, b.path, got, b.answered, b.sent)
	b.answered = got
	b.sent = got
}

// TestCrash kills the program under load, again and again, with durability "full" and "normal".
func TestCrash(t *testing.T) {
	rounds := *soak
	if testing.Short() {
		rounds = 2
	}
	s := script(t, "")
	blobs := newWritten(3 << 20)
	for round := range rounds {
		durability := []string{"full", "normal"}[round%2]
		s.script(fmt.Sprintf("start  batch_size=16  durability=%s  storage_compression=%v",
			durability, round/2%2 == 0))
		about := fmt.Sprintf("round %d, durability %s", round, durability)
		s.writeUntil("kill KILL  -> signal: killed", about, blobs)
	}
}

// TestDrain stops the program under load. A write that was answered 202 is there after the restart.
func TestDrain(t *testing.T) {
	// Small contents, and a sync for each: at the stop many wait in the queue.
	s := script(t, "start  async_write=true  batch_size=1  durability=full")
	s.writeUntil("kill TERM  -> 0  ~msg=stopped", "stopped", newWritten(chunkSize))
}

// A stop commits what waits for its batch, answers it, and leaves no WAL.
func TestStop(t *testing.T) {
	s := script(t, "start  batch_timeout_ms=60000")
	answered := make(chan struct{})
	go func() {
		defer close(answered)
		s.script("PUT /blob/k  v  -> 201")
	}()
	s.script(`
		wait metric blobnom_queue_bytes  1 to 10000
		kill INT  -> 0  ~config="built-in config.toml.example"  ~durability=normal  ~msg=stopped
		sql data  SELECT count(*) FROM blobs  -> 1
	`)
	<-answered
}

// A signal during the start ends it between two shards.
func TestStopWhileStarting(t *testing.T) {
	const hasStarted = "[ -e $BLOBNOM_DATA_DIR/shard_3.db ] || ! kill -0 $$"
	const killer = "(until " + hasStarted + "; do sleep 0.01; done; kill $$) &"
	script(t, "start  "+killer+" blobnom  num_shards=1000  -> 0  ~stopped while starting")
}

// SIGHUP stops the server as other signals do.
func TestHangup(t *testing.T) {
	script(t, `
		start     async_write=true  batch_timeout_ms=60000
		PUT       /blob/k  x  -> 202
		kill HUP   -> 0  ~msg=stopped
		sql data  SELECT count(*) FROM blobs  -> 1

		# A SIGHUP that was ignored at the start, as under nohup, stays ignored.
		start     trap "" HUP; blobnom
		signal    HUP
		GET       /blob/k  -> 200  x
		kill TERM  -> 0  ~msg=stopped
	`)
}

// The server goes on, and stops well, when nobody reads its log any more.
func TestLogWithoutReader(t *testing.T) {
	s := script(t, `start  blobnom 2> >(head -n 1 >&2)  log_level=debug`)
	for range 100 { // each is a line of the log
		s.script("GET /healthz  -> 200")
	}
	s.script(`
		PUT /blob/k  x  -> 201
		kill TERM  -> 0  !msg=stopped
		sql data  SELECT count(*) FROM blobs  -> 1
	`)
}

// A server that cannot open its files at the start says which limit to raise.
func TestFewFileDescriptors(t *testing.T) {
	for most := 20; most <= 36; most += 2 {
		limited := fmt.Sprintf("ulimit -n %d; blobnom", most)
		script(t, "start  "+limited+"  num_shards=20  -> 1  ~ulimit -n")
	}
}

// A server that has run out of file descriptors says so, and is well again when they are back.
func TestFileDescriptors(t *testing.T) {
	s := script(t, `
		start  ulimit -n 40; blobnom
		PUT /blob/k  x  -> 201
	`)
	for i := range 40 {
		s.script(fmt.Sprintf("send %d  GET /readyz", i))
	}
	s.script("wait log  too many open files")
	for _, conn := range s.connections {
		conn.Close()
	}
	s.script(`
		wait GET /readyz  -> 200
		PUT /blob/k2  x  -> 201
		kill TERM  -> 0
	`)
}

// A second signal ends the program at once, whatever it waits for.
func TestSecondSignal(t *testing.T) {
	script(t, `
		start
		send    upload  PUT /blob/k  Content-Length: 10  Expect: 100-continue
		# The answer's first bytes, "HTTP/1.1 100", say that its handler waits for the body.
		take    upload  12
		signal  TERM
		wait log  stopping
		kill TERM  -> signal: terminated
	`)
}

// ============================================================================
// Examples
// ============================================================================

// A server in this process stores a blob, answers it and a part of it, and deletes it.
func Example() {
	dir := noErr(os.MkdirTemp("", "blobnom"))
	defer os.RemoveAll(dir)
	cfg := newConfig()
	cfg.DataDir = dir
	cfg.NumShards = 4
	logger := slog.New(slog.DiscardHandler)
	st := noErr(openStore(context.Background(), cfg, logger, time.Now))
	defer st.close()
	listener := noErr(listen("127.0.0.1:0"))
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error)
	go func() { ended <- newServer(cfg, st, logger).serve(ctx, listener) }()

	url := fmt.Sprintf("http://%s/blob/hello.txt", listener.Addr())
	request := func(method, part, body string) {
		req := noErr(http.NewRequest(method, url, strings.NewReader(body)))
		req.Header.Set("Range", part)
		resp := noErr(client.Do(req))
		defer resp.Body.Close()
		fmt.Printf("%s: %d %q\n", method, resp.StatusCode, noErr(io.ReadAll(resp.Body)))
	}
	request("PUT", "", "Hello, blob!\n")
	request("GET", "", "")
	request("GET", "bytes=7-10", "")
	request("DELETE", "", "")
	request("GET", "", "")
	cancel()
	<-ended
	// Output:
	// PUT: 201 ""
	// GET: 200 "Hello, blob!\n"
	// GET: 206 "blob"
	// DELETE: 204 ""
	// GET: 404 "not found: no blob under this key; keys below it are listed by /blob/?prefix=hello.txt/\n"
}

// ============================================================================
// Benchmarks
//
// Each beside a bare net/http handler that moves the same bytes, same client,
// same run: the ratio counts.
// ============================================================================

func BenchmarkGet(b *testing.B) {
	benchmark(b, workload{method: "GET", content: noise}, "durability=full  batch_size=64")
}

func BenchmarkPut(b *testing.B) {
	benchmark(b, workload{method: "PUT", content: noise},
		"durability=full  batch_size=1", "durability=full  batch_size=64",
		"durability=normal  batch_size=1", "durability=normal  batch_size=64",
		"durability=off  batch_size=1", "durability=off  batch_size=64",
		"durability=full  async_write=true  batch_size=1",
		"durability=full  async_write=true  batch_size=64")
}

// BenchmarkCompression moves text that is compressed at rest, on the way out, both or neither; and
// noise, which nothing compresses.
func BenchmarkCompression(b *testing.B) {
	for name, load := range map[string]workload{
		"PUT-noise": {method: "PUT", content: noise},
		"PUT":       {method: "PUT", content: prose},
		"GET":       {method: "GET", content: prose},
		"GET-gzip":  {method: "GET", content: prose, accepted: "gzip"},
	} {
		b.Run(name, func(b *testing.B) {
			benchmark(b, load,
				"output_compression=true  storage_compression=false",
				"output_compression=true  storage_compression=true")
		})
	}
}

// BenchmarkList takes pages of 1,000 out of 10,000 and of 200,000 blobs.
func BenchmarkList(b *testing.B) {
	for _, n := range []int{10_000, 200_000} {
		s := script(b, "serve  durability=off")
		s.fillRows(n)
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			for b.Loop() {
				after := fmt.Sprintf("key/%08d", rand.IntN(n-1001))
				p := s.list(url.Values{"after": {after}})
				expect(b, len(p.Blobs) == 1000, "%d blobs, want 1000", len(p.Blobs))
			}
		})
		for i := range 4 { // the rows are in wrong shards: not for the check at the end
			s.script(fmt.Sprintf("sql data/%s  DELETE FROM blobs", shardName(i)))
		}
	}
}

// workload is what the clients of a benchmark do: they send or fetch contents of one size.
type workload struct {
	method   string
	accepted string // Accept-Encoding
	content  func(size int, seed uint64) []byte
}

// benchmark drives a bare handler, and then a server of each of the settings.
func benchmark(b *testing.B, load workload, settings ...string) {
	for _, size := range []int{100, 4 << 10, 64 << 10, 1 << 20} {
		body := load.content(size, 1)
		var bare float64
		b.Run(fmt.Sprintf("%d/bare", size), func(b *testing.B) {
			bare = load.drive(b, bareServer(b, body), body)
		})
		for _, setting := range settings {
			b.Run(fmt.Sprintf("%d/%s", size, setting), func(b *testing.B) {
				s := script(b, "serve  "+setting)
				if load.method == "GET" {
					s.fillBenchKeys(body)
				}
				b.ReportMetric(bare/load.drive(b, s.base, body), "of-bare")
			})
		}
	}
}

const benchKeys = 256

func (s *testServer) fillBenchKeys(body []byte) {
	for i := range benchKeys {
		s.put(fmt.Sprint(i), body, "Content-Type", "text/plain")
	}
}

// bareServer starts a server that forgets what it is sent, and answers with body.
func bareServer(b *testing.B, body []byte) (base string) {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == "GET" {
			w.Write(body)
			return
		}
		io.Copy(io.Discard, r.Body)
		w.WriteHeader(http.StatusCreated)
	}))
	b.Cleanup(server.Close)
	return server.URL
}

// drive sends requests over 32 connections, and returns the nanoseconds that one took.
func (load workload) drive(b *testing.B, base string, body []byte) float64 {
	b.SetBytes(int64(len(body)))
	b.SetParallelism(max(1, 32/runtime.GOMAXPROCS(0)))
	if load.method == "GET" {
		body = nil
	}
	b.ResetTimer()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			path := fmt.Sprintf("%s/blob/%d", base, rand.IntN(benchKeys))
			req := noErr(http.NewRequest(load.method, path, bytes.NewReader(body)))
			req.Header.Set("Content-Type", "text/plain")
			req.Header.Set("Accept-Encoding", load.accepted)
			driveOnce(b, req)
		}
	})
	return float64(b.Elapsed()) / float64(b.N)
}

func driveOnce(b *testing.B, req *http.Request) {
	resp, err := client.Do(req)
	if err != nil {
		b.Error(err)
		return
	}
	defer resp.Body.Close()
	_, err = io.Copy(io.Discard, resp.Body)
	expect(b, err == nil && resp.StatusCode < 300, "%s, %v", resp.Status, err)
}
