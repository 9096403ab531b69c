package main

import (
	"bufio"
	"bytes"
	"cmp"
	"compress/gzip"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	crand "crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"database/sql"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math/big"
	"math/rand/v2"
	"mime"
	"mime/multipart"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
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
)

// ============================================================================
// Harness
//
// A server under test is a real listener over a real directory, in this process
// (newTestServer) or, where it is to be killed, as the program itself
// (startProgram): TestMain runs main when told so by the environment. Every
// directory is verified with plain SQL when its test ends.
// ============================================================================

const asProgram = "BLOBNOM_TEST_AS_PROGRAM"

func TestMain(m *testing.M) {
	if os.Getenv(asProgram) != "" {
		main()
	}
	os.Exit(m.Run())
}

var (
	soak = flag.Int("soak", 3, "rounds of the crash test")
	seed = flag.Uint64("seed", 0, "seed of the model test; 0 takes a random one")
)

// testServer is a running server; base is its URL up to the path.
type testServer struct {
	t     testing.TB
	store *store
	log   *syncBuffer
	base  string
	stop  func() error // drains and closes; the error of both
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
	cfg := defaultConfig()
	cfg.DataDir, cfg.NumShards, cfg.BatchSize, cfg.Durability = filepath.Join(t.TempDir(), "data"), 4, 64, "normal"
	for _, f := range change {
		f(cfg)
	}
	return cfg
}

func newTestServer(t testing.TB, change ...func(*config)) *testServer {
	t.Helper()
	return serveConfig(t, testConfig(t, change...), stallTimeout)
}

func serveConfig(t testing.TB, cfg *config, stall time.Duration) *testServer {
	t.Helper()
	return serveAt(t, cfg, stall, time.Now)
}

func serveAt(t testing.TB, cfg *config, stall time.Duration, now func() time.Time) *testServer {
	t.Helper()
	s, dir := &testServer{t: t, log: &syncBuffer{}}, cfg.DataDir
	var level slog.Level
	level.UnmarshalText([]byte(cfg.LogLevel))
	log := slog.New(slog.NewTextHandler(s.log, &slog.HandlerOptions{Level: level}))
	var err error
	if s.store, err = openStore(cfg, log, now); err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s.base = "http://" + ln.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	srv := newServer(cfg, s.store, log)
	srv.stall = stall
	go func() { served <- srv.serve(ctx, func() {}, ln) }()
	s.stop = sync.OnceValue(func() error {
		cancel()
		return errors.Join(<-served, s.store.close())
	})
	t.Cleanup(func() {
		client.CloseIdleConnections()
		if err := s.stop(); err != nil {
			t.Error("stopping:", err)
		}
		verifyDir(t, dir)
	})
	return s
}

// clock is a store's time in the test's hands.
type clock struct{ ms atomic.Int64 }

func newClock() *clock {
	c := &clock{}
	c.ms.Store(time.Date(2026, 1, 2, 3, 4, 5, 678e6, time.UTC).UnixMilli())
	return c
}

func (c *clock) now() time.Time          { return time.UnixMilli(c.ms.Load()) }
func (c *clock) advance(d time.Duration) { c.ms.Add(d.Milliseconds()) }

var client = &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 64, DisableCompression: true},
	CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}

// do sends one request; headers are name, value pairs. It returns the answer
// with its body read; a body that ends early is the returned error.
func (s *testServer) do(method, path string, body io.Reader, headers ...string) (*http.Response, []byte, error) {
	s.t.Helper()
	req, err := http.NewRequest(method, s.base+path, body)
	if err != nil {
		s.t.Fatal(err)
	}
	for i := 0; i < len(headers); i += 2 {
		req.Header.Add(headers[i], headers[i+1])
	}
	resp, err := client.Do(req)
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
	if err != nil {
		s.t.Fatalf("%s %s: %v", method, path, err)
	}
	if resp.StatusCode != status {
		s.t.Fatalf("%s %s: %d %q, want %d", method, path, resp.StatusCode, data, status)
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

func (s *testServer) wantBlob(key string, body []byte) *http.Response {
	s.t.Helper()
	resp, got := s.want(http.StatusOK, "GET", blobPath(key), nil)
	if !bytes.Equal(got, body) {
		s.t.Fatalf("GET %q: %d bytes %.40q, want %d bytes %.40q", key, len(got), got, len(body), body)
	}
	return resp
}

// blobPath percent-encodes every byte of key that is not plainly safe.
func blobPath(key string) string {
	var b strings.Builder
	b.WriteString("/blob/")
	for _, c := range []byte(key) {
		if c == '-' || '0' <= c && c <= '9' || 'A' <= c && c <= 'Z' || 'a' <= c && c <= 'z' {
			b.WriteByte(c)
		} else {
			fmt.Fprintf(&b, "%%%02X", c)
		}
	}
	return b.String()
}

// noise returns n bytes that differ for each seed.
func noise(n int, seed uint64) []byte {
	b := make([]byte, n)
	rand.NewChaCha8(sha256.Sum256([]byte(strconv.FormatUint(seed, 10)))).Read(b)
	return b
}

// keyOn returns a key that lies on the given shard.
func (s *testServer) keyOn(shard int, name string) string {
	for i := 0; ; i++ {
		key := fmt.Sprintf("%s-%d", name, i)
		if sh, _ := s.store.shardOf(key); sh.index == shard {
			return key
		}
	}
}

func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !ok(); { // the disk of a busy machine
		if time.Now().After(deadline) {
			t.Fatal("not within a minute: " + what)
		}
		time.Sleep(5 * time.Millisecond) // polling an outside effect, not synchronizing
	}
}

// verifyDir checks a directory at rest with SQL of its own: structure,
// placement, every content against its size and SHA-256, and that each chunk
// belongs to a blob or an orphan. It returns the SHA-256 of every blob.
func verifyDir(t testing.TB, dir string) map[string]string {
	t.Helper()
	sums := map[string]string{}
	files, err := filepath.Glob(filepath.Join(dir, "shard_*.db"))
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		db := openDB(file, "mode=ro")
		defer db.Close()
		var ok, hash string
		var n, index, stray, astray int64
		for query, to := range map[string]any{
			"PRAGMA integrity_check":                          &ok,
			"SELECT value FROM meta WHERE key = 'num_shards'": &n,
			"SELECT value FROM meta WHERE key = 'shard'":      &index,
			"SELECT value FROM meta WHERE key = 'hash'":       &hash,
			"SELECT count(*) FROM chunks WHERE id >> 20 NOT IN (SELECT id FROM blobs UNION SELECT id FROM orphans)": &stray,
			`SELECT abs(blobs - (SELECT count(*) FROM blobs)) + abs(bytes - (SELECT coalesce(sum(size), 0) FROM blobs)) + abs(orphans - (SELECT count(*) FROM orphans))
				FROM totals`: &astray,
		} {
			if err := db.QueryRow(query).Scan(to); err != nil {
				t.Errorf("%s: %s: %v", file, query, err)
				return sums
			}
		}
		if ok != "ok" || stray != 0 || astray != 0 {
			t.Errorf("%s: integrity_check %q, %d stray chunks, totals wrong by %d", file, ok, stray, astray)
		}
		rows, err := db.Query("SELECT key, id, size, stored, codec, coalesce(crc32, -1), sha256, data FROM blobs")
		if err != nil {
			t.Fatal(err)
		}
		defer rows.Close()
		for rows.Next() {
			var key string
			var id, size, stored, codec, crc int64
			var sum, data []byte
			if err := rows.Scan(&key, &id, &size, &stored, &codec, &crc, &sum, &data); err != nil {
				t.Fatal(err)
			}
			if want := int64(hashes[hash](key) % uint64(n)); want != index {
				t.Errorf("key %q lies in shard %d, not %d", key, index, want)
			}
			if size > chunkSize {
				data = slices.Concat(chunksOf(t, db, id)...)
			}
			if int64(len(data)) != stored || (codec == 0) != (crc == -1) || codec == 0 && stored != size {
				t.Errorf("key %q: %d bytes lie there, recorded %d with codec %d, CRC-32 %d, size %d", key, len(data), stored, codec, crc, size)
			}
			if codec == 1 {
				data = unzip(t, slices.Concat([]byte(gzipHeader), data, []byte(gzipEnd),
					binary.LittleEndian.AppendUint32(nil, uint32(crc)), binary.LittleEndian.AppendUint32(nil, uint32(size))))
			}
			if got := sha256.Sum256(data); int64(len(data)) != size || !bytes.Equal(got[:], sum) {
				t.Errorf("key %q: %d bytes of SHA-256 %x, recorded %d of %x", key, len(data), got, size, sum)
			}
			sums[key] = hex.EncodeToString(sum)
		}
		if err := rows.Err(); err != nil {
			t.Error(err)
		}
	}
	return sums
}

// unzip decodes exactly one gzip member.
func unzip(t testing.TB, member []byte) []byte {
	t.Helper()
	in := bytes.NewReader(member)
	r, err := gzip.NewReader(in)
	if err != nil {
		t.Fatal(err)
	}
	r.Multistream(false)
	data, err := io.ReadAll(r)
	if err != nil || in.Len() > 0 {
		t.Fatalf("gzip member of %d bytes: %v, %d left over", len(member), err, in.Len())
	}
	return data
}

// prose returns n bytes that deflate well and differ for each seed.
func prose(n int, seed uint64) []byte {
	rnd := rand.New(rand.NewPCG(seed, 1))
	words := strings.Fields("a blob is a sequence of bytes under a key and nothing more than that; 0 1 2 3 4 5 6 7 8 9 {} <p>")
	b := make([]byte, 0, n+10)
	for len(b) < n {
		b = append(append(b, words[rnd.IntN(len(words))]...), ' ')
	}
	return b[:n]
}

func chunksOf(t testing.TB, db *sql.DB, id int64) (chunks [][]byte) {
	rows, err := db.Query("SELECT data FROM chunks WHERE id >> 20 = ? ORDER BY id", id)
	if err != nil {
		t.Fatal(err)
	}
	defer rows.Close()
	for rows.Next() {
		var c []byte
		if err := rows.Scan(&c); err != nil {
			t.Fatal(err)
		}
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
		if err := db.QueryRow(query).Scan(&n); err != nil {
			t.Fatal(err)
		}
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

func startProgram(t testing.TB, dir string, env ...string) *program {
	t.Helper()
	p := &program{testServer: &testServer{t: t, log: &syncBuffer{}}, done: make(chan error, 1)}
	p.cmd = exec.Command(os.Args[0])
	p.cmd.Dir = t.TempDir()
	p.cmd.Env = append(os.Environ(), append([]string{asProgram + "=1", "BLOBNOM_DATA_DIR=" + dir, "BLOBNOM_ADDR=127.0.0.1:0"}, env...)...)
	stderr, err := p.cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	listening := make(chan string, 1)
	go func() {
		for lines := bufio.NewScanner(stderr); lines.Scan(); {
			fmt.Fprintln(p.log, lines.Text())
			if _, rest, ok := strings.Cut(lines.Text(), " listen="); ok {
				addr, _, _ := strings.Cut(rest, " ")
				select {
				case listening <- addr:
				default:
				}
			}
		}
		p.done <- p.cmd.Wait()
	}()
	t.Cleanup(func() { p.cmd.Process.Kill() })
	select {
	case addr := <-listening:
		p.base = "http://" + addr
	case err := <-p.done:
		t.Fatalf("the program ended: %v\n%s", err, p.log)
	case <-time.After(30 * time.Second):
		t.Fatal("the program does not start")
	}
	return p
}

// signal sends sig and waits for the end.
func (p *program) signal(sig os.Signal) error {
	p.t.Helper()
	if err := p.cmd.Process.Signal(sig); err != nil {
		p.t.Fatal(err)
	}
	select {
	case err := <-p.done:
		return err
	case <-time.After(40 * time.Second):
		p.t.Fatal("the program does not end")
		return nil
	}
}

// ============================================================================
// Commands
// ============================================================================

func TestCommandLine(t *testing.T) {
	t.Chdir(t.TempDir())
	for _, c := range []struct {
		args           string
		code           int
		stdout, stderr string
	}{
		{"-h", 0, "usage: blobnom [-config FILE] [COMMAND]", ""},
		{"version", 0, "blobnom " + version, ""},
		{"frobnicate", 2, "", `unknown command "frobnicate"`},
		{"version please", 2, "", `version: there is no argument "please"`},
		{"serve here", 2, "", `serve: there is no argument "here"`},
		{"sign", 2, "", "sign: an argument is missing"},
		{"sign -method BREW k", 2, "", "-method one of GET"},
		{"sign -ttl 0s k", 2, "", "-ttl is at least 1s"},
		{"sign a b", 2, "", `sign: there is no argument "b"`},
		{"sign \xff", 2, "", "not valid UTF-8"},
		{"sign k", 2, "", "auth_token: is empty"},
		{"sign -h", 0, "usage: blobnom", ""},
		{"-frob", 2, "", "-frob"},
		{"-config", 2, "", "-config"},
		{"-config missing.toml", 2, "", "missing.toml"},
	} {
		var stdout, stderr bytes.Buffer
		code := run(t.Context(), strings.Fields(c.args), nil, &stdout, &stderr)
		if code != c.code || !strings.Contains(stdout.String(), c.stdout) || !strings.Contains(stderr.String(), c.stderr) {
			t.Errorf("%q: code %d, stdout %q, stderr %q", c.args, code, &stdout, &stderr)
		}
		if left, _ := os.ReadDir("."); len(left) > 0 {
			t.Errorf("%q left %v behind", c.args, left)
		}
	}
}

func TestServeRefusesPortInUse(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	dir := filepath.Join(t.TempDir(), "data")
	var stdout, stderr bytes.Buffer
	code := run(t.Context(), nil, []string{"BLOBNOM_ADDR=" + ln.Addr().String(), "BLOBNOM_DATA_DIR=" + dir}, &stdout, &stderr)
	if code != 1 || !strings.Contains(stderr.String(), ln.Addr().String()) || strings.Count(stderr.String(), "\n") != 1 {
		t.Errorf("code %d, stderr %q", code, &stderr)
	}
	if fileExists(dir) {
		t.Error("a directory was created")
	}
}

func TestServeEndsCleanly(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "data")
	p := startProgram(t, dir, "BLOBNOM_BATCH_TIMEOUT_MS=60000")
	answered := make(chan struct{})
	go func() {
		p.put("k", []byte("v")) // waits for its batch until the server stops
		close(answered)
	}()
	time.Sleep(300 * time.Millisecond) // for the request to be in the queue, which shows nowhere
	if err := p.signal(os.Interrupt); err != nil {
		t.Fatalf("SIGINT: %v\n%s", err, p.log)
	}
	<-answered
	left, _ := filepath.Glob(filepath.Join(dir, "*"))
	if len(left) != 5 { // four shards and the lock: no WAL, no reserve
		t.Errorf("left behind: %v", left)
	}
	if sums := verifyDir(t, dir); len(sums) != 1 {
		t.Errorf("%d blobs", len(sums))
	}
	for _, want := range []string{"num_shards=4", "durability=full", "config.toml.example"} {
		if !strings.Contains(p.log.String(), want) {
			t.Errorf("the start line lacks %s:\n%s", want, p.log)
		}
	}
}

// ============================================================================
// Configuration
// ============================================================================

func TestConfig(t *testing.T) {
	const min = "data_dir = 'd'\nnum_shards = 3\n"
	for _, c := range []struct {
		name, file string
		env        []string
		problems   []string // none: it loads
	}{
		{"minimal", min, nil, nil},
		{"all from env", "", []string{"BLOBNOM_DATA_DIR=e", "BLOBNOM_NUM_SHARDS=9", "BLOBNOM_ASYNC_WRITE=true"}, nil},
		{"env wins", min, []string{"BLOBNOM_NUM_SHARDS=5"}, nil},
		{"foreign env", min, []string{"BLOBNOM_NO_SUCH_KEY=1"}, nil},
		{"empty", "", nil, []string{"data_dir: is required", "num_shards: is required"}},
		{"syntax", "data_dir = \n", []string{"BLOBNOM_HASH=md5"}, []string{"not valid TOML", "BLOBNOM_HASH"}},
		{"token", min + "auth_token = 'sekret\u00e9'\n", nil, []string{"auth_token"}},
		{"several", "num_shards = 0\nbatch_size = 'x'\nasync_write = 1\nfoo = 2\n[bar]\n", nil,
			[]string{"data_dir: is required", "num_shards = 0: must be at least 1", `batch_size = "x": must be a whole number`, "async_write = 1: must be true or false", "foo = 2: unknown key", "bar = "}},
		{"float", min + "batch_size = 1.5\n", nil, []string{"batch_size = 1.5"}},
		{"ranges", min + "batch_timeout_ms = -1\nmax_blob_bytes = -1\nmax_pending_bytes = 0\n", nil, []string{"batch_timeout_ms = -1", "max_blob_bytes = -1", "max_pending_bytes = 0"}},
		{"words", min + "durability = 'most'\nhash = 'md5'\nlog_level = 'loud'\nlog_format = ''\naddr = 'here'\n", nil,
			[]string{"durability", "full, normal, off", "fnv1a, crc32c, sha256", "log_level", "log_format", "addr"}},
		{"env types", min, []string{"BLOBNOM_BATCH_SIZE=many", "BLOBNOM_ASYNC_WRITE=yes", "BLOBNOM_DATA_DIR="}, []string{"BLOBNOM_BATCH_SIZE", "BLOBNOM_ASYNC_WRITE", "BLOBNOM_DATA_DIR"}},
		{"later keys", min + "no_such_key = true\n", nil, []string{"no_such_key = true: unknown key"}},
		{"loud token", min + "AUTH_TOKEN = 'sekret'\n", nil, []string{"AUTH_TOKEN"}},
		{"unquoted token", min + "auth_token = sekret\n", nil, []string{"line 3"}},
		{"misspelt token", min + "auth_tokens = 'sekret'\n[x]\nauth_token = 'sekret'\n", nil, []string{"auth_tokens", "x ="}},
		{"token from the environment", min, []string{"BLOBNOM_AUTH_TOKEN=sekret with spaces"}, []string{"BLOBNOM_AUTH_TOKEN", "visible ASCII"}},
		{"half a pair", min + "tls_cert = 'cert.pem'\n", nil, []string{"tls_cert = \"cert.pem\", tls_key = \"\"", "both or neither"}},
		{"no pair", min + "tls_cert = 'missing.pem'\ntls_key = 'missing.key'\n", nil, []string{"missing.pem"}},
		{"not a string", min + "auth_token = 123456\nauth_tokens = ['x']\n", nil, []string{`auth_token = "(secret)": must be a string`, "auth_tokens = "}},
		{"half a pair, refused", min + "tls_cert = 5\ntls_key = 'k'\nlog_level = 'x'\n", nil, []string{"tls_cert = 5: must be a string"}},
		{"a path with a word", min + "tls_cert = '/run/secrets/tls.crt'\ntls_key = '/run/secrets/auth/tls.key'\n", nil, []string{`tls_key = "/run/secrets/auth/tls.key"`, "no such file"}},
		{"a pasted key", min + "tls_cert = '-----BEGIN PRIVATE KEY----- sekret'\ntls_key = 'x'\n", nil, []string{`tls_cert = "(secret)"`, "must name files"}},
		{"origin", min + "cors_origin = 'https://example.org/'\n", nil, []string{"cors_origin", "must be an origin"}},
	} {
		file := filepath.Join(t.TempDir(), "c.toml")
		if err := os.WriteFile(file, []byte(c.file), 0o600); err != nil {
			t.Fatal(err)
		}
		cfg, source, err := loadConfig(file, c.env)
		if c.problems == nil {
			if err != nil || source != file || cfg.NumShards < 3 {
				t.Errorf("%s: %v", c.name, err)
			}
			continue
		}
		for _, want := range c.problems {
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("%s: %v, want %q", c.name, err, want)
			}
		}
		if strings.Contains(fmt.Sprint(err), "sekret") || strings.Contains(fmt.Sprint(err), "123456") {
			t.Error("a token is shown:", err)
		}
		if got := strings.Count(fmt.Sprint(err), "\n"); c.name == "several" && got != 6 || c.name == "half a pair, refused" && got != 2 {
			t.Errorf("%s: %d problems: %v", c.name, got, err)
		}
	}
}

func TestExampleConfigLoads(t *testing.T) {
	t.Chdir(t.TempDir())
	cfg, source, err := loadConfig("", nil)
	if err != nil || !strings.Contains(source, "built-in") {
		t.Fatal(cfg, source, err)
	}
	// What is commented out shows the defaults.
	text := strings.NewReplacer("\n# ", "\n").Replace(exampleConfig)
	var lines []string
	for line := range strings.Lines(text) {
		if key, _, ok := strings.Cut(line, " = "); ok && strings.Trim(key, "abcdefghijklmnopqrstuvwxyz_") == "" {
			lines = append(lines, line)
		}
	}
	if len(lines) != len(cfg.options()) {
		t.Errorf("the example shows %d keys of %d", len(lines), len(cfg.options()))
	}
	if err := os.WriteFile("config.toml", []byte(strings.Join(lines, "")), 0o600); err != nil {
		t.Fatal(err)
	}
	shown, source, err := loadConfig("", nil)
	if err != nil || source != "config.toml" || *shown != *cfg {
		t.Errorf("%+v from %s, %v, want %+v", shown, source, err, cfg)
	}
}

func FuzzConfig(f *testing.F) {
	f.Add(exampleConfig, "true")
	f.Add("num_shards = 1979-05-27", "")
	f.Fuzz(func(t *testing.T, text, env string) {
		file := filepath.Join(t.TempDir(), "c.toml")
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Skip()
		}
		cfg, _, err := loadConfig(file, []string{"BLOBNOM_ASYNC_WRITE=" + env})
		if err == nil && (cfg.NumShards < 1 || cfg.DataDir == "" || env != "true" && env != "false") {
			t.Errorf("accepted: %+v", cfg)
		}
	})
}

// ============================================================================
// HTTP server, Handlers
// ============================================================================

func TestKeys(t *testing.T) {
	s := newTestServer(t)
	good := []string{"a", "photos/2026/cat.jpg", "a//b", "../x", ".", "a/./b", "/", "a b", "ä/日本", "%", "%2F", "a?b#c", "a+b&c=d", "\x01\x7f", "'; DROP TABLE blobs; --", strings.Repeat("k", maxKeyBytes)}
	for i, key := range good {
		s.put(key, fmt.Append(nil, i))
	}
	for i, key := range good {
		s.wantBlob(key, fmt.Append(nil, i))
	}
	s.want(200, "GET", "/blob/photos/2026/cat.jpg", nil)
	s.want(200, "GET", "/blob/a%2f%2fb?x=//", nil)
	// What a client should have escaped does not change what it did escape.
	s.put("ü//\"", []byte("raw"))
	c, err := net.Dial("tcp", strings.TrimPrefix(s.base, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	fmt.Fprint(c, "GET /blob/ü%2F%2F\" HTTP/1.1\r\nHost: x\r\n\r\nGET http://x HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
	if got, err := io.ReadAll(c); strings.Count(string(got), " 200 OK\r\n") != 2 {
		t.Errorf("%s %v", got, err)
	}
	for _, c := range []struct {
		path string
		code int
	}{
		{"/blob/a//b", 400}, {"/blob//", 400}, {"//blob/a", 400}, {"/blob/./a", 400}, {"/blob/a/../b", 400}, {"/blob/..", 400}, {"/blob/a/.", 400},
		{"/blob/%00", 400}, {"/blob/%ff", 400}, {"/blob/" + strings.Repeat("k", maxKeyBytes+1), 400},
		{"/blob", 404}, {"/blobs/a", 404}, {"/nothing", 404}, {"/healthz/", 404}, {"/blob/a.", 404}, {"/blob/.a", 404}, {"/blob/a/", 404},
	} {
		for _, method := range []string{"GET", "DELETE"} {
			if method == "DELETE" && c.code == 404 {
				continue
			}
			resp, body := s.want(c.code, method, c.path, nil)
			if bytes.Count(body, []byte("\n")) != 1 || resp.Header.Get("Location") != "" {
				t.Errorf("%s: %q", c.path, body)
			}
		}
	}
	s.want(400, "PUT", "/blob/", nil)
	s.want(400, "DELETE", "/blob/", nil)
	for _, c := range [][3]string{{"PATCH", "/blob/a", "GET, HEAD, PUT, POST, DELETE"}, {"POST", "/", "GET, HEAD"}, {"DELETE", "/healthz", "GET, HEAD"}} {
		if resp, _ := s.want(405, c[0], c[1], nil); resp.Header.Get("Allow") != c[2] {
			t.Errorf("%v: Allow %q", c, resp.Header.Get("Allow"))
		}
	}
}

func FuzzKeys(f *testing.F) {
	s := newTestServer(f)
	for _, key := range []string{"a", "a//b", "..", "%", "\x00", "\xff", ""} {
		f.Add(key)
	}
	f.Fuzz(func(t *testing.T, key string) {
		s.t = t
		resp, body, err := s.do("PUT", blobPath(key), strings.NewReader(key))
		if err != nil {
			t.Fatal(err)
		}
		switch resp.StatusCode {
		case 201:
			s.wantBlob(key, []byte(key))
		case 400:
		default:
			t.Errorf("%q: %d %s", key, resp.StatusCode, body)
		}
	})
}

func TestHeaders(t *testing.T) {
	s := newTestServer(t)
	start := time.Now().Truncate(time.Millisecond)
	for _, size := range []int{0, 5, chunkSize + 5} {
		body := noise(size, 1)
		sum := sha256.Sum256(body)
		key := fmt.Sprint("size", size)
		resp, _ := s.want(201, "POST", "/blob/"+key, body, "Content-Type", "text/html")
		etag := `"` + hex.EncodeToString(sum[:]) + `"`
		if resp.Header.Get("ETag") != etag {
			t.Errorf("PUT: ETag %s", resp.Header.Get("ETag"))
		}
		get := s.wantBlob(key, body)
		head, _ := s.want(200, "HEAD", "/blob/"+key, nil)
		for name, want := range map[string]string{
			"Content-Type": "text/html", "Content-Length": strconv.Itoa(size), "ETag": etag, "Accept-Ranges": "bytes",
			"Blob-Version": "0", "X-Content-Type-Options": "nosniff", "Content-Security-Policy": "sandbox",
			"Repr-Digest": "sha-256=:" + base64.StdEncoding.EncodeToString(sum[:]) + ":", "Blob-Updated": get.Header.Get("Blob-Created"),
		} {
			if get.Header.Get(name) != want || head.Header.Get(name) != want {
				t.Errorf("%s: %q, HEAD %q, want %q", name, get.Header.Get(name), head.Header.Get(name), want)
			}
		}
		created, err := time.Parse("2006-01-02T15:04:05.000Z", get.Header.Get("Blob-Created"))
		modified, err2 := http.ParseTime(get.Header.Get("Last-Modified"))
		if err != nil || err2 != nil || created.Before(start) || time.Since(created) > time.Minute || !modified.Equal(created.Truncate(time.Second)) {
			t.Errorf("Blob-Created %q, Last-Modified %q: %v %v", get.Header.Get("Blob-Created"), get.Header.Get("Last-Modified"), err, err2)
		}
		time.Sleep(2 * time.Millisecond) // for the timestamps to differ
		s.put(key, []byte("new"))
		again := s.wantBlob(key, []byte("new"))
		if again.Header.Get("Blob-Version") != "1" || again.Header.Get("Blob-Created") != get.Header.Get("Blob-Created") ||
			again.Header.Get("Blob-Updated") <= get.Header.Get("Blob-Updated") || again.Header.Get("Content-Type") != "application/octet-stream" {
			t.Errorf("after a replacement: %v", again.Header)
		}
		s.want(204, "DELETE", "/blob/"+key, nil)
		s.put(key, body)
		if v := s.wantBlob(key, body).Header.Get("Blob-Version"); v != "0" {
			t.Errorf("version %s after deletion", v)
		}
	}
	for _, h := range [][2]string{{"Content-Type", strings.Repeat("x", 256)}, {"Content-Type", "a/\xff"}, {"Content-Encoding", "gzip"}, {"Content-Range", "bytes 0-1/2"}} {
		s.want(400, "PUT", "/blob/h", []byte("x"), h[0], h[1])
	}
	s.want(404, "GET", "/blob/h", nil)
}

func TestRangesAndConditions(t *testing.T) {
	s := newTestServer(t)
	for _, size := range []int{1000, 2*chunkSize + 1000} {
		body := noise(size, 2)
		s.put("k", body)
		whole := s.wantBlob("k", body)
		etag, modified := whole.Header.Get("ETag"), whole.Header.Get("Last-Modified")
		last := strconv.Itoa(size - 1)
		for _, c := range []struct {
			headers []string
			code    int
			body    []byte
		}{
			{[]string{"Range", "bytes=0-0"}, 206, body[:1]},
			{[]string{"Range", "bytes=10-19"}, 206, body[10:20]},
			{[]string{"Range", "bytes=-7"}, 206, body[size-7:]},
			{[]string{"Range", "bytes=990-"}, 206, body[990:]},
			{[]string{"Range", "bytes=" + last + "-"}, 206, body[size-1:]},
			{[]string{"Range", "bytes=" + strconv.Itoa(size) + "-"}, 416, nil},
			{[]string{"Range", "lines=1-2"}, 200, body},
			{[]string{"Range", "bytes=9-1"}, 416, nil},
			{[]string{"Range", "bytes=0-9", "If-Range", etag}, 206, body[:10]},
			{[]string{"Range", "bytes=0-9", "If-Range", `"other"`}, 200, body},
			{[]string{"Range", "bytes=0-9", "If-Range", modified}, 206, body[:10]},
			{[]string{"If-None-Match", etag}, 304, []byte{}},
			{[]string{"If-None-Match", "W/" + etag}, 304, []byte{}},
			{[]string{"If-None-Match", `"a", ` + etag}, 304, []byte{}},
			{[]string{"If-None-Match", "*"}, 304, []byte{}},
			{[]string{"If-None-Match", `"other"`}, 200, body},
			{[]string{"If-Modified-Since", modified}, 304, []byte{}},
			{[]string{"If-Modified-Since", "Mon, 01 Jan 2001 00:00:00 GMT"}, 200, body},
			{[]string{"If-Match", `"other"`}, 412, nil},
			{[]string{"If-Match", etag}, 200, body},
			{[]string{"If-None-Match", "nonsense"}, 200, body},
		} {
			resp, got := s.want(c.code, "GET", "/blob/k", nil, c.headers...)
			if c.code > 400 && (bytes.Count(got, []byte("\n")) != 1 || resp.Header.Get("Repr-Digest") != "") {
				t.Errorf("%v: %q %v", c.headers, got, resp.Header)
			}
			if c.body != nil && !bytes.Equal(got, c.body) {
				t.Errorf("%v: %d bytes, want %d", c.headers, len(got), len(c.body))
			}
			if resp, got := s.want(c.code, "HEAD", "/blob/k", nil, c.headers...); len(got) != 0 || c.code == 200 && resp.ContentLength != int64(size) {
				t.Errorf("HEAD %v: %d bytes, Content-Length %d", c.headers, len(got), resp.ContentLength)
			}
		}
		resp, data := s.want(206, "GET", "/blob/k", nil, "Range", "bytes=1-2,500-"+last+",0-3")
		_, params, err := mime.ParseMediaType(resp.Header.Get("Content-Type"))
		if err != nil {
			t.Fatal(err)
		}
		parts := multipart.NewReader(bytes.NewReader(data), params["boundary"])
		for _, want := range [][]byte{body[1:3], body[500:], body[:4]} {
			part, err := parts.NextPart()
			if err != nil {
				t.Fatal(err)
			}
			if got, err := io.ReadAll(part); err != nil || !bytes.Equal(got, want) {
				t.Errorf("part %v: %d bytes, want %d, %v", part.Header, len(got), len(want), err)
			}
		}
	}
	s.put("empty", nil)
	s.want(200, "GET", "/blob/empty", nil, "Range", "bytes=-1")
	s.want(404, "GET", "/blob/missing", nil, "If-None-Match", "*", "Range", "bytes=0-1")
}

// Conditional writes: each row is one request to a key that holds "old".
func TestConditionalWrites(t *testing.T) {
	etag := func(content string) string { return fmt.Sprintf(`"%x"`, sha256.Sum256([]byte(content))) }
	old, zipped := etag("old"), strings.TrimSuffix(etag("old"), `"`)+`-gzip"`
	const past, future = "Mon, 01 Jan 2001 00:00:00 GMT", "Fri, 01 Jan 2100 00:00:00 GMT"
	for _, async := range []bool{false, true} {
		s := newTestServer(t, func(c *config) { c.AsyncWrite = async })
		for i, c := range []struct {
			headers         []string
			exists, missing int // status of a PUT
		}{
			{[]string{"If-Match", old}, 201, 412},
			{[]string{"If-Match", zipped}, 201, 412},
			{[]string{"If-Match", `"a,b" , ` + old + `,,"c"`}, 201, 412},
			{[]string{"If-Match", "*"}, 201, 412},
			{[]string{"If-Match", "W/" + old}, 412, 412},
			{[]string{"If-Match", `"other"`}, 412, 412},
			{[]string{"If-Match", `""`}, 412, 412},
			{[]string{"If-Match", strings.ToUpper(old)}, 412, 412},
			{[]string{"If-None-Match", "*"}, 412, 201},
			{[]string{"If-None-Match", old}, 412, 201},
			{[]string{"If-None-Match", "W/" + old}, 412, 201},
			{[]string{"If-None-Match", `W/"x", W/` + zipped}, 412, 201},
			{[]string{"If-None-Match", `"other"`}, 201, 201},
			{[]string{"If-Match", old, "If-None-Match", `"other"`}, 201, 412},
			{[]string{"If-Match", old, "If-None-Match", old}, 412, 412},
			{[]string{"If-Unmodified-Since", past}, 412, 201},
			{[]string{"If-Unmodified-Since", "Thu, 01 Jan 1970 00:00:00 GMT"}, 412, 201},
			{[]string{"If-Unmodified-Since", future}, 201, 201},
			{[]string{"If-Match", old, "If-Unmodified-Since", past}, 201, 412},
			{[]string{"If-Match", "abc"}, 400, 400},
			{[]string{"If-Match", `"abc`}, 400, 400},
			{[]string{"If-Match", `w/"abc"`}, 400, 400},
			{[]string{"If-Match", `"a" "b"`}, 400, 400},
			{[]string{"If-Match", `*, "a"`}, 400, 400},
			{[]string{"If-Match", ""}, 400, 400},
			{[]string{"If-None-Match", ","}, 400, 400},
			{[]string{"If-None-Match", `"a b"`}, 400, 400},
			{[]string{"If-None-Match", "**"}, 400, 400},
			{[]string{"If-Unmodified-Since", "yesterday"}, 400, 400},
		} {
			for _, exists := range []bool{true, false} {
				for _, method := range []string{"PUT", "POST", "DELETE"} {
					key := fmt.Sprint(i, exists, method)
					before, want := "old", c.exists
					if exists {
						s.put(key, []byte(before)) // in async mode it may still be queued
					} else {
						before, want = "", c.missing
					}
					if want == 201 && method == "DELETE" {
						want = 204
					}
					resp, body := s.want(want, method, "/blob/"+key, []byte("new"), c.headers...)
					switch {
					case want == 201 && resp.Header.Get("ETag") != etag("new"), want >= 400 && bytes.Count(body, []byte("\n")) != 1:
						t.Errorf("%v: %v %q", c.headers, resp.Header, body)
					case want == 201:
						before = "new"
					case want == 204:
						before = ""
					}
					if before == "" {
						s.want(404, "GET", "/blob/"+key, nil)
					} else if v := s.wantBlob(key, []byte(before)).Header.Get("Blob-Version"); exists && (v == "0") != (before == "old") {
						t.Errorf("%v: version %s of %q", c.headers, v, before)
					}
				}
			}
		}
		s.want(412, "PUT", "/blob/large", noise(3*chunkSize, 1), "If-Match", "*") // its chunks are swept
		s.want(404, "GET", "/blob/large", nil)
		eventually(t, "the chunks of a refused upload are swept", func() bool {
			return countRows(t, s.store.dir, "SELECT (SELECT count(*) FROM chunks) + (SELECT count(*) FROM orphans)") == 0
		})
		s.want(200, "GET", "/readyz", nil) // a refusal is no failure
		// Two lines are one list.
		s.put("lines", []byte("old"))
		req, _ := http.NewRequest("PUT", s.base+"/blob/lines", strings.NewReader("new"))
		req.Header["If-Match"] = []string{`"x"`, old}
		if resp, err := client.Do(req); err != nil || resp.StatusCode != 201 {
			t.Error("two lines:", resp, err)
		} else {
			resp.Body.Close()
		}
	}
}

// Of many creators of one key one wins, and counting by If-Match loses nothing.
func TestConditionalRaces(t *testing.T) {
	for _, async := range []bool{false, true} {
		for _, size := range []int{10, chunkSize + 10} {
			s := newTestServer(t, func(c *config) { c.AsyncWrite, c.NumShards = async, 2 })
			var group sync.WaitGroup
			var won [3]atomic.Int64
			winner := make([]atomic.Int64, 3)
			for i := range 64 {
				group.Go(func() {
					for k := range won {
						resp, _, err := s.do("PUT", fmt.Sprint("/blob/", k), bytes.NewReader(noise(size, uint64(i))), "If-None-Match", "*")
						if err != nil || resp.StatusCode != 201 && resp.StatusCode != 412 {
							t.Error(resp, err)
						} else if resp.StatusCode == 201 {
							won[k].Add(1)
							winner[k].Store(int64(i))
						}
					}
				})
			}
			group.Wait()
			for k := range won {
				if n := won[k].Load(); n != 1 {
					t.Errorf("async %v, key %d: %d creators won", async, k, n)
				}
				s.wantBlob(fmt.Sprint(k), noise(size, uint64(winner[k].Load())))
			}
		}
		s := newTestServer(t, func(c *config) { c.AsyncWrite = async })
		s.put("n", []byte("0"))
		const clients, rounds = 32, 5
		var group sync.WaitGroup
		for range clients {
			group.Go(func() {
				for done := 0; done < rounds; {
					resp, body, err := s.do("GET", "/blob/n", nil)
					if err != nil {
						t.Error(err)
						return
					}
					n, _ := strconv.Atoi(string(body))
					resp, _, err = s.do("PUT", "/blob/n", strings.NewReader(strconv.Itoa(n+1)), "If-Match", resp.Header.Get("ETag"))
					if err != nil || resp.StatusCode != 201 && resp.StatusCode != 412 {
						t.Error(resp, err)
						return
					}
					if resp.StatusCode == 201 {
						done++
					}
				}
			})
		}
		group.Wait()
		if v := s.wantBlob("n", []byte(strconv.Itoa(clients*rounds))).Header.Get("Blob-Version"); v != strconv.Itoa(clients*rounds) {
			t.Errorf("version %s", v)
		}
	}
}

func TestDigests(t *testing.T) {
	s := newTestServer(t)
	for _, body := range [][]byte{[]byte("content"), {}, noise(3*chunkSize, 1)} {
		sum := sha256.Sum256(body)
		right := "sha-256=:" + base64.StdEncoding.EncodeToString(sum[:]) + ":"
		sum[0]++
		wrong := "sha-256=:" + base64.StdEncoding.EncodeToString(sum[:]) + ":"
		for _, c := range []struct {
			value string
			code  int
		}{
			{right, 201}, {wrong, 400}, {right + ", unixsum=:AAA=:", 201}, {"sha-512=:AAAA:,\t" + right, 201}, {"sha-512=:AAAA:, " + wrong, 400},
			{"sha-512=:AAAA:", 201}, {"sha-512=:AAAA:, md5=::", 201}, {wrong + ", " + right, 201}, {right + "," + wrong, 400}, // the last one counts
			{strings.ReplaceAll(right, "=:", ":")[:len("sha-256")] + strings.ReplaceAll(right[len("sha-256"):], "=:", ":"), 400}, // no "=:"
			{strings.TrimSuffix(right, "=:") + ":", 201}, // padding may lack
			{right + ";x=1", 201}, {wrong + " ; x;y=2", 400}, {right[:len(right)-2] + "==:", 400},
			{"", 400}, {"sha-256", 400}, {"sha-256=abc", 400}, {"sha-256=:AAAA:", 400}, {"sha-256=:!!!!:", 400}, {right + ",", 400},
			{"SHA-256" + right[7:], 400}, {"sha-512=1", 400}, {right + " " + right, 400},
		} {
			for _, name := range []string{"Repr-Digest", "Content-Digest"} {
				s.want(204, "DELETE", "/blob/k", nil)
				_, answer := s.want(c.code, "PUT", "/blob/k", body, name, c.value)
				if c.code == 201 {
					s.wantBlob("k", body)
				} else if s.want(404, "GET", "/blob/k", nil); bytes.Count(answer, []byte("\n")) != 1 {
					t.Errorf("%q", answer)
				}
			}
		}
		s.want(400, "PUT", "/blob/k", body, "Repr-Digest", right, "Content-Digest", wrong)
		s.want(400, "PUT", "/blob/k", body, "Repr-Digest", wrong, "Content-Digest", right)
		s.want(404, "GET", "/blob/k", nil)
	}
	// In a trailer, where it is when the body was not known before.
	for want, content := range map[int]string{201: "content", 400: "another"} {
		sum := sha256.Sum256([]byte("content"))
		req, _ := http.NewRequest("PUT", s.base+"/blob/trailer", unknownLength([]byte(content)))
		req.Trailer = http.Header{"Content-Digest": {"sha-256=:" + base64.StdEncoding.EncodeToString(sum[:]) + ":"}}
		resp, err := client.Do(req)
		if err != nil || resp.StatusCode != want {
			t.Error("trailer:", resp, err)
		} else {
			resp.Body.Close()
		}
	}
	s.wantBlob("trailer", []byte("content"))
	s.put("k", []byte("old"))
	s.want(400, "PUT", "/blob/k", []byte("new"), "Repr-Digest", "sha-256=:"+strings.Repeat("A", 43)+"=:")
	s.wantBlob("k", []byte("old"))
	eventually(t, "the chunks of refused uploads are swept", func() bool {
		return countRows(t, s.store.dir, "SELECT (SELECT count(*) FROM chunks) + (SELECT count(*) FROM orphans)") == 0
	})
}

func TestExpiry(t *testing.T) {
	clock := newClock()
	cfg := testConfig(t)
	s := serveAt(t, cfg, stallTimeout, clock.now)
	for _, ttl := range []string{"", "0", "-1", "0s", "-1s", "x", "1d", "1.5", "3153600001", "876000h1ns", "1e3", "99999999999999999999", "%2B5", "5%20", "1&ttl=1", "%zz"} {
		_, body := s.want(400, "PUT", "/blob/k?ttl="+ttl, []byte("x"))
		if bytes.Count(body, []byte("\n")) != 1 {
			t.Errorf("ttl %q: %q", ttl, body)
		}
	}
	s.want(404, "GET", "/blob/k", nil)
	for _, c := range []struct {
		ttl  string
		want time.Duration
	}{{"90", 90 * time.Second}, {"90s", 90 * time.Second}, {"1.5h", 90 * time.Minute}, {"250ms", 250 * time.Millisecond},
		{"3153600000", maxTTL}, {"876000h", maxTTL}, {"1", time.Second}} {
		want := clock.now().Add(c.want).UTC().Format("2006-01-02T15:04:05.000Z")
		resp, _ := s.want(201, "PUT", "/blob/k?ttl="+c.ttl, []byte("x"))
		if got := s.wantBlob("k", []byte("x")).Header.Get("Blob-Expires"); got != want || resp.Header.Get("Blob-Expires") != want {
			t.Errorf("ttl %s: Blob-Expires %s and %s, want %s", c.ttl, resp.Header.Get("Blob-Expires"), got, want)
		}
	}
	s.put("k", []byte("for ever")) // a write without ttl ends it
	if got, there := s.wantBlob("k", []byte("for ever")).Header["Blob-Expires"]; there {
		t.Error("Blob-Expires", got)
	}
	// To the millisecond, for whatever reads it, cached or not, large or small.
	for i, size := range []int{0, 10, cacheItem + 10, 3 * chunkSize} {
		key, body := fmt.Sprint("e", i), noise(size, 1)
		s.put(key, []byte("before"))
		first := s.wantBlob(key, []byte("before"))
		clock.advance(time.Minute)
		s.want(201, "PUT", "/blob/"+key+"?ttl=10s", body)
		s.want(201, "PUT", "/blob/"+key+"?ttl=10s", body)
		clock.advance(9999 * time.Millisecond)
		last := s.wantBlob(key, body)
		if last.Header.Get("Blob-Version") != "2" || last.Header.Get("Blob-Created") != first.Header.Get("Blob-Created") {
			t.Errorf("before expiry: %v", last.Header)
		}
		s.want(200, "HEAD", "/blob/"+key, nil)
		s.want(412, "PUT", "/blob/"+key, nil, "If-None-Match", "*")
		clock.advance(time.Millisecond)
		s.want(404, "GET", "/blob/"+key, nil)
		s.want(404, "HEAD", "/blob/"+key, nil)
		s.want(404, "GET", "/blob/"+key, nil, "If-None-Match", "*")
		if _, page := s.want(200, "GET", "/blob/?prefix=e", nil); bytes.Contains(page, []byte(`"key"`)) {
			t.Errorf("listed: %s", page)
		}
		s.want(412, "PUT", "/blob/"+key, nil, "If-Match", "*")
		s.want(412, "DELETE", "/blob/"+key, nil, "If-Match", "*")
		s.want(201, "PUT", "/blob/"+key+"?ttl=10s", []byte("anew"), "If-None-Match", "*")
		again := s.wantBlob(key, []byte("anew"))
		if again.Header.Get("Blob-Version") != "0" || again.Header.Get("Blob-Created") != stamp(clock.ms.Load()) {
			t.Errorf("after expiry: %v", again.Header)
		}
		clock.advance(time.Hour)
		s.want(201, "PUT", "/blob/"+key, []byte("anew")) // over what has expired, unconditionally
		if again := s.wantBlob(key, []byte("anew")); again.Header.Get("Blob-Version") != "0" {
			t.Errorf("after expiry: %v", again.Header)
		}
		s.want(204, "DELETE", "/blob/"+key, nil)
	}
	// A download that has begun ends whole.
	body := noise(20*chunkSize, 2)
	s.want(201, "PUT", "/blob/slow?ttl=1m", body)
	resp, err := client.Get(s.base + "/blob/slow")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	clock.advance(time.Hour)
	s.want(404, "GET", "/blob/slow", nil)
	eventually(t, "the row is deleted", func() bool { return countRows(t, cfg.DataDir, "SELECT count(*) FROM blobs WHERE key = 'slow'") == 0 })
	if got, err := io.ReadAll(resp.Body); err != nil || !bytes.Equal(got, body) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
}

// What has expired gives its space back, and nobody asked for it.
func TestExpirySweep(t *testing.T) {
	clock := newClock()
	cfg := testConfig(t)
	s := serveAt(t, cfg, stallTimeout, clock.now)
	s.put("stays", []byte("x"))
	for i := range 100 {
		s.want(201, "PUT", fmt.Sprintf("/blob/small%d?ttl=1m", i), noise(20_000, uint64(i)))
		if i%10 == 0 {
			s.want(201, "PUT", fmt.Sprintf("/blob/large%d?ttl=1m", i), noise(3*chunkSize, uint64(i)))
		}
	}
	clock.advance(time.Minute)
	eventually(t, "all of it is swept", func() bool {
		return countRows(t, cfg.DataDir, "SELECT (SELECT count(*) FROM blobs) + (SELECT count(*) FROM chunks) + (SELECT count(*) FROM orphans)") == 1
	})
	eventually(t, "the space is returned", func() bool {
		var sum int64
		for i := range 4 {
			if info, err := os.Stat(filepath.Join(cfg.DataDir, shardName(i))); err == nil {
				sum += info.Size()
			}
		}
		return sum <= 4*(vacuumPages+40)*4096
	})
	s.wantBlob("stays", []byte("x"))
}

// Nor does what is deleted wait for what has expired.
func TestExpirySweepIsFair(t *testing.T) {
	clock := newClock()
	s := serveAt(t, testConfig(t, func(c *config) { c.NumShards = 1 }), stallTimeout, clock.now)
	s.put("large", noise(20*chunkSize, 1))
	exec1(t, filepath.Join(s.store.dir, shardName(0)), fmt.Sprintf(`INSERT INTO blobs WITH RECURSIVE n (i) AS (SELECT 1000 UNION ALL SELECT i + 1 FROM n WHERE i < %d)
		SELECT i, printf('k%%d', i), 0, x'%x', 0, 0, NULL, 'text/plain', 0, 0, %d, 0, x'' FROM n`, 1000+map[bool]int{false: 100_000, true: 30_000}[testing.Short()], sha256.Sum256(nil), clock.ms.Load()))
	s.want(204, "DELETE", "/blob/large", nil)
	eventually(t, "the chunks are swept", func() bool { return countRows(t, s.store.dir, "SELECT count(*) FROM chunks") == 0 })
	if n := countRows(t, s.store.dir, "SELECT count(*) FROM blobs"); n == 0 {
		t.Error("they waited for all that has expired")
	}
}

// page is the answer of a listing.
type page struct {
	Blobs []listed
	Next  *string
}

func (s *testServer) list(query url.Values) (p page) {
	s.t.Helper()
	resp, body := s.want(200, "GET", "/blob/?"+query.Encode(), nil)
	if err := json.Unmarshal(body, &p); err != nil || resp.Header.Get("Content-Type") != "application/json" {
		s.t.Fatalf("%v: %v %q", err, resp.Header, body)
	}
	return p
}

// listAll goes through all pages and returns the keys.
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

func TestListing(t *testing.T) {
	for _, shards := range []int64{1, 4} {
		for _, async := range []bool{false, true} {
			s := newTestServer(t, func(c *config) { c.NumShards, c.AsyncWrite = shards, async })
			if p := s.list(nil); p.Blobs == nil || len(p.Blobs) != 0 || p.Next != nil {
				t.Errorf("of nothing: %+v", p)
			}
			var keys []string
			for c := range 128 { // every odd byte, alone and between others
				if c != 0 {
					keys = append(keys, string(rune(c)), "odd/"+string(rune(c))+"z")
				}
			}
			keys = append(keys, "é", "日本", "\u2028", "\U0010ffff", "odd/\U0010ffff\U0010ffff", "odd", "odd/", "odd0", "oddy", strings.Repeat("k", maxKeyBytes))
			slices.Sort(keys)
			for _, i := range rand.Perm(len(keys)) {
				s.put(keys[i], []byte(keys[i]))
			}
			for _, limit := range []int{1, 7, 1000} {
				if got := s.listAll("", limit); !slices.Equal(got, keys) {
					t.Errorf("limit %d: %q, want %q", limit, got, keys)
				}
			}
			for _, prefix := range []string{"odd", "odd/", "odd/\U0010ffff", "\x01", "é", "k", "none", strings.Repeat("k", maxKeyBytes+1), "\x00", "\U0010ffff"} {
				var want []string
				for _, key := range keys {
					if strings.HasPrefix(key, prefix) {
						want = append(want, key)
					}
				}
				if got := s.listAll(prefix, 5); !slices.Equal(got, want) {
					t.Errorf("prefix %q: %q, want %q", prefix, got, want)
				}
			}
			for _, after := range []string{"odd/", "a", "\U0010ffff", "a\x00", "n", ""} { // keys or not
				i, found := slices.BinarySearch(keys, after)
				if found {
					i++
				}
				p := s.list(url.Values{"after": {after}, "limit": {"3"}})
				for j, row := range p.Blobs {
					if row.Key != keys[i+j] {
						t.Errorf("after %q: %q, want %q", after, row.Key, keys[i+j])
					}
				}
				if len(p.Blobs) != min(3, len(keys)-i) {
					t.Errorf("after %q: %d rows", after, len(p.Blobs))
				}
			}
			// A full last page has no next.
			if p := s.list(url.Values{"limit": {strconv.Itoa(len(keys))}}); len(p.Blobs) != len(keys) || p.Next != nil {
				t.Errorf("%d rows of %d, next %v", len(p.Blobs), len(keys), p.Next)
			}
			if p := s.list(url.Values{"prefix": {"b"}, "after": {"a"}}); len(p.Blobs) != 1 {
				t.Errorf("%+v", p)
			}
			if p := s.list(url.Values{"prefix": {"b"}, "after": {"c"}}); len(p.Blobs) != 0 {
				t.Errorf("%+v", p)
			}
			if async {
				s.want(202, "DELETE", blobPath("odd"), nil)
			} else {
				s.want(204, "DELETE", blobPath("odd"), nil)
			}
			if got := s.listAll("odd", 1000); slices.Contains(got, "odd") {
				t.Error("a deleted key is listed")
			}
			// A row says what HEAD says.
			s.want(201, "PUT", "/blob/row?ttl=1h", noise(chunkSize+5, 1), "Content-Type", "a/b", "If-None-Match", "*")
			resp, _ := s.want(200, "HEAD", "/blob/row", nil)
			row := s.list(url.Values{"prefix": {"row"}}).Blobs[0]
			if want := (listed{"row", chunkSize + 5, "a/b", resp.Header.Get("ETag"), resp.Header.Get("Blob-Created"), resp.Header.Get("Blob-Updated"), 0, resp.Header.Get("Blob-Expires")}); row != want {
				t.Errorf("%+v, want %+v", row, want)
			}
			if _, body := s.want(200, "HEAD", "/blob/", nil); len(body) != 0 {
				t.Errorf("HEAD: %q", body)
			}
			for _, query := range []string{"limit=0", "limit=10001", "limit=-1", "limit=", "limit=x", "limit=1.0", "limit=%2B5", "limit=1&limit=2", "prefix=%ff", "after=%c3", "prefix=%zz", "a;b"} {
				if _, body := s.want(400, "GET", "/blob/?"+query, nil); bytes.Count(body, []byte("\n")) != 1 {
					t.Errorf("%s: %q", query, body)
				}
			}
			s.want(200, "GET", "/blob/?limit=10000", nil)
		}
	}
}

// A default page, and pages of more than is read at a time.
func TestListingPages(t *testing.T) {
	s := newTestServer(t, func(c *config) { c.Durability = "off" })
	want := make([]string, 2001)
	var group sync.WaitGroup
	for w := range 16 {
		group.Go(func() {
			for i := w; i < len(want); i += 16 {
				want[i] = fmt.Sprintf("k%05d", i)
				s.put(want[i], nil)
			}
		})
	}
	group.Wait()
	for limit, n := range map[string]int{"": defaultPage, "1001": 1001, "2000": 2000, "2001": 2001, "10000": 2001} {
		query := url.Values{}
		if limit != "" {
			query.Set("limit", limit)
		}
		p := s.list(query)
		if len(p.Blobs) != n || (p.Next != nil) != (n < len(want)) {
			t.Errorf("limit %s: %d rows, next %v", limit, len(p.Blobs), p.Next)
		}
		for i, row := range p.Blobs {
			if row.Key != want[i] {
				t.Fatalf("limit %s: row %d is %q", limit, i, row.Key)
			}
		}
	}
	if got := s.listAll("k0", 999); !slices.Equal(got, want) {
		t.Errorf("%d keys", len(got))
	}
}

// A page costs what a page costs: an index finds its rows, in order.
func TestQueryPlans(t *testing.T) {
	s := newTestServer(t, func(c *config) { c.NumShards = 1 })
	for query, want := range map[string]string{
		pageQuery:   "SEARCH blobs USING INDEX sqlite_autoindex_blobs_1 (key>? AND key<?)",
		expireQuery: "SEARCH blobs USING COVERING INDEX expiring (expires_at<?)",
		debrisQuery: "SEARCH blobs USING COVERING INDEX expiring (expires_at<?)",
	} {
		args := slices.Repeat([]any{1}, strings.Count(query, "?"))
		rows, err := s.store.shards[0].readers.Query("EXPLAIN QUERY PLAN "+query, args...)
		if err != nil {
			t.Fatal(err)
		}
		var plan []string
		for rows.Next() {
			var id, parent, unused int
			var detail string
			if err := rows.Scan(&id, &parent, &unused, &detail); err != nil {
				t.Fatal(err)
			}
			plan = append(plan, detail)
		}
		rows.Close()
		if got := strings.Join(plan, "; "); !strings.Contains(got, want) || strings.Contains(got, "TEMP") || strings.Contains(got, "SCAN blobs") {
			t.Errorf("%s\n%s, want %s", query, got, want)
		}
	}
}

func TestStorageCompression(t *testing.T) {
	cfg := testConfig(t, func(c *config) { c.NumShards = 1 })
	type kept struct {
		body  []byte
		codec int64
	}
	blobs := map[string]kept{}
	lies := func(key string) (codec, stored int64) { // how it lies in the shard
		db := openDB(filepath.Join(cfg.DataDir, shardName(0)), "mode=ro")
		defer db.Close()
		if err := db.QueryRow("SELECT codec, stored FROM blobs WHERE key = ?", key).Scan(&codec, &stored); err != nil {
			t.Fatal(err)
		}
		return codec, stored
	}
	for round, compress := range []bool{false, true, false, true} {
		cfg.StorageCompression = compress
		s := serveConfig(t, cfg, stallTimeout)
		for key, b := range blobs { // whatever the option was when they came
			s.wantBlob(key, b.body)
		}
		for _, size := range []int{0, 1, minDeflate, 4096, 20_000, chunkSize - 1, chunkSize, chunkSize + 1, 2 * chunkSize, 5*chunkSize + 77} {
			mixed := append(prose(size/2, 5), noise(size-size/2, 6)...)
			for kind, body := range map[string][]byte{"noise": noise(size, 1), "prose": prose(size, uint64(round)), "mixed": mixed} {
				key := fmt.Sprint(round, kind, size)
				s.put(key, body)
				s.wantBlob(key, body)
				codec, stored := lies(key)
				blobs[key] = kept{body, codec}
				want := int64(0)
				if compress && size >= minDeflate && kind != "noise" {
					want = 1
				}
				if kind == "mixed" && size < 4096 { // may pay or not
					want = codec
				}
				if codec != want || codec == 1 && stored > int64(size)*7/8 {
					t.Errorf("%s: codec %d with %d bytes of %d, want codec %d", key, codec, stored, size, want)
				}
				s.want(200, "HEAD", "/blob/"+key, nil)
				for range 4 {
					if size == 0 {
						break
					}
					from := rand.IntN(size)
					to := from + rand.IntN(min(size-from, 2*chunkSize))
					if _, got := s.want(206, "GET", "/blob/"+key, nil, "Range", fmt.Sprintf("bytes=%d-%d", from, to)); !bytes.Equal(got, body[from:to+1]) {
						t.Fatalf("%s: range %d-%d", key, from, to)
					}
				}
			}
		}
		// Over one another: any codec, any size.
		for i, size := range []int{100, 5000, 3 * chunkSize, 5000, 2 * chunkSize, 100} {
			body := prose(size, uint64(i))
			s.put("replaced", body)
			s.wantBlob("replaced", body)
		}
		if err := s.stop(); err != nil {
			t.Fatal(err)
		}
	}
}

// What does not get smaller is not deflated, nor is what follows a chunk that
// does.
func TestCompressionPays(t *testing.T) {
	s := newTestServer(t, func(c *config) { c.NumShards, c.StorageCompression, c.OutputCompression = 1, true, true })
	skewed := noise(3*chunkSize, 1) // some bytes are frequent, yet there is next to nothing to gain
	for i, c := range skewed {
		if c < 25 {
			skewed[i] = 0
		}
	}
	for i, c := range []struct {
		body  []byte
		codec int64
	}{
		{skewed, 0}, {skewed[:chunkSize], 0}, {append(prose(chunkSize, 1), noise(5*chunkSize+100, 2)...), 1},
		{append(noise(chunkSize, 1), prose(5*chunkSize, 2)...), 0}, {append(prose(chunkSize, 1), skewed...), 1},
	} {
		s.put("k", c.body)
		s.wantBlob("k", c.body)
		codec, stored := countRows(t, s.store.dir, "SELECT codec FROM blobs"), countRows(t, s.store.dir, "SELECT stored FROM blobs")
		if most := int64(len(c.body)) + 30*int64(len(c.body)/chunkSize+1); codec != c.codec || stored > most {
			t.Errorf("case %d: codec %d, %d bytes of %d", i, codec, stored, len(c.body))
		}
		if _, got := s.want(200, "GET", "/blob/k", nil, "Accept-Encoding", "gzip"); c.codec == 1 && !bytes.Equal(unzip(t, got), c.body) {
			t.Errorf("case %d: the gzip member differs", i)
		}
	}
}

// A range on a deflated blob decodes the chunks it touches and no other.
func TestRangeDecodesItsChunks(t *testing.T) {
	s := newTestServer(t, func(c *config) { c.NumShards, c.StorageCompression = 1, true })
	body := prose(4*chunkSize, 1)
	s.put("k", body)
	exec1(t, filepath.Join(s.store.dir, shardName(0)), "UPDATE chunks SET data = zeroblob(length(data)) WHERE id & 1048575 IN (0, 2)")
	_, got := s.want(206, "GET", "/blob/k", nil, "Range", fmt.Sprintf("bytes=%d-%d", chunkSize, 2*chunkSize-1))
	if !bytes.Equal(got, body[chunkSize:2*chunkSize]) {
		t.Error("the second chunk differs")
	}
	if _, _, err := s.do("GET", "/blob/k", nil, "Range", fmt.Sprintf("bytes=%d-%d", chunkSize, 2*chunkSize)); err == nil {
		t.Error("a damaged chunk went unnoticed")
	}
	for _, header := range []string{"bytes=10-20", "bytes=0-", "bytes=" + strconv.Itoa(2*chunkSize) + "-", "lines=1"} {
		resp, _ := s.want(500, "GET", "/blob/k", nil, "Range", header)
		if resp.Header.Get("Content-Range")+resp.Header.Get("ETag") != "" {
			t.Errorf("%s: %v", header, resp.Header)
		}
	}
	exec1(t, filepath.Join(s.store.dir, shardName(0)), "DELETE FROM chunks; DELETE FROM blobs") // for the check at the end
}

func TestAcceptsGzip(t *testing.T) {
	for value, want := range map[string]bool{
		"": false, "gzip": true, "GZIP": true, "x-gzip": true, "deflate": false, "gzip, deflate, br": true, "br;q=1.0, gzip;q=0.8, *;q=0.1": true,
		"*": true, "*;q=0": false, "gzip;q=0": false, "gzip;q=0.000": false, "gzip;q=0.001": true, "gzip;q=0, *": false, "*, gzip;q=0": false,
		"identity": false, "identity;q=0": false, "identity;q=0, *": true, "identity;q=0, gzip;q=0": false, "gzip;q=0.5, identity;q=0.6": false, "gzip;q=0.5, identity;q=0.5": true,
		"identity, *;q=0.5": false, "gzip ; q=1": true, "gzip;Q=0.3": true, "gzip;q=2": false, "gzip;q=": false, "gzip;q=0.1234": false, "gzip;level=9": false,
		"gzip;q=1;x=y": false, ",,gzip,": true, "gzipped": false, "gz ip": false, "x-gzip;q=0, *": false,
	} {
		if got := acceptsGzip(http.Header{"Accept-Encoding": {value}}); got != want {
			t.Errorf("%q: %v", value, got)
		}
	}
	if acceptsGzip(http.Header{}) || !acceptsGzip(http.Header{"Accept-Encoding": {"br", "gzip"}}) {
		t.Error("no header, or two")
	}
}

func TestOutputCompression(t *testing.T) {
	for _, storage := range []bool{false, true} {
		s := newTestServer(t, func(c *config) { c.StorageCompression, c.OutputCompression = storage, true })
		for _, c := range []struct {
			contentType string
			body        []byte
			raw, stored bool // whether it is sent compressed when it lies as it is, and with storage compression
		}{
			{"text/plain", prose(5000, 1), true, true},
			{"text/html; charset=utf-8", prose(3*chunkSize+5, 1), true, true},
			{"Application/JSON", prose(minEncode, 1), true, true},
			{"application/problem+json", prose(chunkSize, 1), true, true},
			{"text/plain", prose(minEncode-1, 1), false, true},
			{"text/plain", noise(5000, 1), true, true},
			{"text/plain", nil, false, false},
			{"image/png", prose(5000, 1), false, true},
			{"image/svg+xml", prose(5000, 1), false, true},
			{"video/mp4", noise(3*chunkSize, 1), false, false},
			{"application/zip", noise(5000, 1), false, false},
			{"application/octet-stream", prose(5000, 1), false, true},
		} {
			s.put("k", c.body, "Content-Type", c.contentType)
			plain := s.wantBlob("k", c.body)
			etag := plain.Header.Get("ETag")
			if plain.Header.Get("Content-Encoding") != "" || plain.ContentLength != int64(len(c.body)) {
				t.Errorf("%s: without Accept-Encoding: %v", c.contentType, plain.Header)
			}
			encoded := storage && c.stored || !storage && c.raw
			resp, got := s.want(200, "GET", "/blob/k", nil, "Accept-Encoding", "br, gzip")
			head, _ := s.want(200, "HEAD", "/blob/k", nil, "Accept-Encoding", "br, gzip")
			for _, name := range []string{"Content-Encoding", "Vary", "ETag", "Repr-Digest", "Content-Type", "Last-Modified"} {
				if resp.Header.Get(name) != head.Header.Get(name) {
					t.Errorf("%s: %q with GET, %q with HEAD", name, resp.Header.Get(name), head.Header.Get(name))
				}
			}
			if !encoded {
				if resp.Header.Get("Content-Encoding") != "" || resp.Header.Get("ETag") != etag || !bytes.Equal(got, c.body) {
					t.Errorf("%s: %d bytes, %v", c.contentType, len(got), resp.Header)
				}
				continue
			}
			zipped := strings.TrimSuffix(etag, `"`) + `-gzip"`
			if h := resp.Header; h.Get("Content-Encoding") != "gzip" || h.Get("Vary") != "Accept-Encoding" || h.Get("ETag") != zipped ||
				h.Get("Repr-Digest") != "" || h.Get("Content-Digest") != "" || h.Get("Content-Type") != c.contentType {
				t.Errorf("%s: %v", c.contentType, h)
			}
			if !bytes.Equal(unzip(t, got), c.body) {
				t.Errorf("%s: the gzip member has another content", c.contentType)
			}
			if storage && c.body != nil && resp.ContentLength >= 0 && (resp.ContentLength != int64(len(got)) || head.ContentLength != resp.ContentLength) {
				t.Errorf("Content-Length %d and %d of %d bytes", resp.ContentLength, head.ContentLength, len(got))
			}
			// A range is of the content as it is, always.
			part, bytes10 := s.want(206, "GET", "/blob/k", nil, "Accept-Encoding", "gzip", "Range", "bytes=3-12")
			if part.Header.Get("Content-Encoding") != "" || part.Header.Get("ETag") != etag || !bytes.Equal(bytes10, c.body[3:13]) {
				t.Errorf("range: %v %q", part.Header, bytes10)
			}
			if _, got := s.want(200, "GET", "/blob/k", nil, "Accept-Encoding", "gzip", "Range", "bytes=3-12", "If-Range", zipped); !bytes.Equal(got, c.body) {
				t.Error("If-Range with the tag of the encoded representation")
			}
			// Either tag names the content, whatever is accepted; 304 says which one the client has.
			for _, accept := range []string{"gzip", "identity"} {
				for _, tag := range []string{etag, zipped} {
					for _, list := range []string{tag, "W/" + tag, `"x", ` + tag} {
						resp, _ := s.want(304, "GET", "/blob/k", nil, "Accept-Encoding", accept, "If-None-Match", list)
						if resp.Header.Get("ETag") != tag || resp.Header.Get("Content-Encoding") != "" {
							t.Errorf("304 for %s: %v", list, resp.Header)
						}
					}
					s.want(200, "GET", "/blob/k", nil, "Accept-Encoding", accept, "If-Match", `"x",`+tag)
				}
				s.want(304, "GET", "/blob/k", nil, "Accept-Encoding", accept, "If-None-Match", "*")
				s.want(304, "GET", "/blob/k", nil, "Accept-Encoding", accept, "If-Modified-Since", resp.Header.Get("Last-Modified"))
				resp, _ := s.want(412, "GET", "/blob/k", nil, "Accept-Encoding", accept, "If-Match", `"x"`)
				if resp.Header.Get("Content-Encoding") != "" || resp.Header.Get("ETag") != "" {
					t.Errorf("412: %v", resp.Header)
				}
				resp, got := s.want(200, "GET", "/blob/k", nil, "Accept-Encoding", accept, "If-None-Match", `"x"`, "If-Modified-Since", resp.Header.Get("Date"))
				if (resp.Header.Get("Content-Encoding") == "gzip") != (accept == "gzip") || accept != "gzip" && !bytes.Equal(got, c.body) {
					t.Errorf("200: %v", resp.Header)
				}
			}
		}
		// Off means off.
		off := newTestServer(t, func(c *config) { c.StorageCompression = storage })
		off.put("k", prose(5000, 1), "Content-Type", "text/plain")
		if resp, got := off.want(200, "GET", "/blob/k", nil, "Accept-Encoding", "gzip"); resp.Header.Get("Content-Encoding")+resp.Header.Get("Vary") != "" || !bytes.Equal(got, prose(5000, 1)) {
			t.Errorf("with output_compression off: %v", resp.Header)
		}
	}
}

func FuzzFields(f *testing.F) {
	for _, seed := range []string{"*", `"a", W/"b"`, "sha-256=:AAAA:", "gzip;q=0.5, *;q=0", "90s", "1.5h", ""} {
		f.Add(seed)
	}
	sum := [sha256.Size]byte{1}
	f.Fuzz(func(t *testing.T, value string) {
		b := &blob{sum: sum}
		plain, _ := b.etags()
		if list, err := tagsOf(http.Header{"If-Match": {value}}, "If-Match"); err == nil {
			// What is accepted says the same when each tag has a line of its own.
			again, err := tagsOf(http.Header{"If-Match": list}, "If-Match")
			if err != nil || !slices.Equal(list, again) {
				t.Errorf("%q: %q, then %q, %v", value, list, again, err)
			}
			if found := list.find(b); (found != "") != slices.ContainsFunc(list, func(tag string) bool { return tag == "*" || strings.HasPrefix(tag, plain[:65]) && found != "" }) {
				t.Errorf("%q: found %q", value, found)
			}
		}
		if sums, err := digestsOf(http.Header{"Repr-Digest": {value}}); err == nil {
			for _, sum := range sums {
				if len(sum) != sha256.Size || !strings.Contains(value, "sha-256=:") {
					t.Errorf("%q: %x", value, sum)
				}
			}
		}
		if acceptsGzip(http.Header{"Accept-Encoding": {value}}) && !strings.Contains(strings.ToLower(value), "gzip") && !strings.Contains(value, "*") {
			t.Errorf("%q accepts gzip", value)
		}
		if ttl, err := ttlOf(&http.Request{URL: &url.URL{RawQuery: url.Values{"ttl": {value}}.Encode()}}); err == nil && (ttl <= 0 || ttl > maxTTL) {
			t.Errorf("%q: %v", value, ttl)
		}
	})
}

func FuzzCodec(f *testing.F) {
	f.Add([]byte("text text text"), 1)
	f.Add(prose(1000, 1), 300)
	f.Fuzz(func(t *testing.T, seed []byte, repeat int) {
		chunk := bytes.Repeat(seed, 1+min(max(repeat, 0), chunkSize)/(len(seed)+1))
		chunk = chunk[:min(len(chunk), chunkSize)]
		data := deflate(chunk)
		got, err := inflate(nil, data, int64(len(chunk)))
		if err != nil || !bytes.Equal(got, chunk) {
			t.Errorf("%d bytes, %v, want %d", len(got), err, len(chunk))
		}
		compressible(chunk)
		if _, err := inflate(nil, data, int64(len(chunk))+1); !errors.Is(err, errCorrupt) {
			t.Errorf("one byte more than there is: %v", err)
		}
		if len(chunk) > 0 {
			if _, err := inflate(nil, data, int64(len(chunk))-1); !errors.Is(err, errCorrupt) {
				t.Errorf("one byte less than there is: %v", err)
			}
		}
		inflate(nil, seed, int64(min(max(repeat, 0), chunkSize))) // whatever it is, no panic
	})
}

func FuzzRange(f *testing.F) {
	s := newTestServer(f)
	small, large := noise(100, 3), noise(chunkSize+100, 4)
	s.put("small", small)
	s.put("large", large)
	f.Add("bytes=0-1")
	f.Add("bytes=262140-262150")
	f.Add("bytes=-1,0-0")
	f.Fuzz(func(t *testing.T, header string) {
		s.t = t
		for key, body := range map[string][]byte{"small": small, "large": large} {
			resp, got, err := s.do("GET", "/blob/"+key, nil, "Range", header)
			if err != nil {
				t.Skip() // not a header value
			}
			var from, to, size int
			switch n, _ := fmt.Sscanf(resp.Header.Get("Content-Range"), "bytes %d-%d/%d", &from, &to, &size); {
			case resp.StatusCode == 206 && n == 3:
				if size != len(body) || !bytes.Equal(got, body[from:to+1]) {
					t.Errorf("%q: %s with %d bytes", header, resp.Header.Get("Content-Range"), len(got))
				}
			case resp.StatusCode == 200:
				if !bytes.Equal(got, body) {
					t.Errorf("%q: not the whole", header)
				}
			case resp.StatusCode >= 500:
				t.Errorf("%q: %s", header, resp.Status)
			}
		}
	})
}

// A body of unknown length hides its type, so that the client chunks it.
func unknownLength(b []byte) io.Reader { return io.MultiReader(bytes.NewReader(b)) }

func TestMaxBlobBytes(t *testing.T) {
	for _, limit := range []int{100, chunkSize, 2*chunkSize + 1} {
		s := newTestServer(t, func(c *config) { c.MaxBlobBytes = int64(limit) })
		s.put("k", noise(limit, 1))
		for _, over := range []int{1, chunkSize} {
			body := noise(limit+over, 2)
			s.want(413, "PUT", "/blob/k", body)
			if resp, _, err := s.do("PUT", "/blob/k", unknownLength(body)); err == nil && resp.StatusCode != 413 {
				t.Errorf("limit %d, chunked: %s", limit, resp.Status)
			}
		}
		s.wantBlob("k", noise(limit, 1))
		eventually(t, "the refused upload's chunks are gone", func() bool { return countRows(t, s.store.dir, "SELECT count(*) FROM orphans") == 0 })
	}
	s := newTestServer(t, func(c *config) { c.MaxBlobBytes = 0 })
	s.put("k", noise(3*chunkSize, 1)) // with buffers that a refused upload gave back, once twice
	s.wantBlob("k", noise(3*chunkSize, 1))
	// Early: the answer comes though the body never does.
	s = newTestServer(t, func(c *config) { c.MaxBlobBytes = 10 })
	c, err := net.Dial("tcp", strings.TrimPrefix(s.base, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	fmt.Fprint(c, "PUT /blob/k HTTP/1.1\r\nHost: x\r\nContent-Length: 11\r\nExpect: 100-continue\r\n\r\n")
	if line, err := bufio.NewReader(c).ReadString('\n'); !strings.Contains(line, " 413 ") {
		t.Errorf("%q %v", line, err)
	}
}

func TestHealth(t *testing.T) {
	s := newTestServer(t)
	if _, body := s.want(200, "GET", "/healthz", nil); string(body) != "ok\n" {
		t.Errorf("%q", body)
	}
	_, body := s.want(200, "GET", "/readyz", nil)
	var ready struct {
		Ready  bool
		Shards []struct {
			Shard int
			Ready bool
		}
	}
	if err := json.Unmarshal(body, &ready); err != nil || !ready.Ready || len(ready.Shards) != 4 || !ready.Shards[3].Ready || ready.Shards[3].Shard != 3 {
		t.Errorf("%s %v", body, err)
	}
	if _, body := s.want(200, "GET", "/", nil); !strings.Contains(string(body), version) || !strings.Contains(string(body), "curl -T FILE "+s.base+"/blob/KEY") {
		t.Errorf("%s", body)
	}
}

// Who waited for its commit longer than a client may stall gets its answer.
func TestLateAnswer(t *testing.T) {
	cfg := testConfig(t, func(c *config) { c.NumShards, c.BatchTimeoutMS = 1, 1500 })
	s := serveConfig(t, cfg, time.Second)
	s.put("k", []byte("v"))
	s.want(204, "DELETE", "/blob/k", nil)
}

// lockShard keeps the first shard from being written, as another process would.
func (s *testServer) lockShard() (unlock func()) {
	s.t.Helper()
	db := openDB(filepath.Join(s.store.dir, shardName(0)), "")
	db.SetMaxOpenConns(1)
	s.t.Cleanup(func() { db.Close() })
	if _, err := db.Exec("BEGIN IMMEDIATE"); err != nil {
		s.t.Fatal(err)
	}
	return func() {
		if _, err := db.Exec("ROLLBACK"); err != nil {
			s.t.Fatal(err)
		}
	}
}

// A stop does not wait for who waits for another process.
func TestStopDespiteForeignLock(t *testing.T) {
	t.Parallel() // it mostly waits
	if testing.Short() {
		t.Skip("waits for the end of the drain")
	}
	s := newTestServer(t, func(c *config) { c.AsyncWrite, c.NumShards = true, 1 })
	unlock := s.lockShard()
	s.put("k", []byte("v"))
	read := make(chan struct{})
	go func() { s.do("GET", "/blob/k", nil); close(read) }() // waits for the write
	time.Sleep(100 * time.Millisecond)                       // until it does
	start := time.Now()
	if err := s.stop(); err != nil {
		t.Error(err)
	}
	<-read
	if took := time.Since(start); took > drainTimeout+4*busyTimeout || !strings.Contains(s.log.String(), "answered 202 failed") {
		t.Errorf("stopped after %v\n%s", took, s.log)
	}
	unlock()
}

// Who may do what: each row is a request to a server with a token.
func TestAuth(t *testing.T) {
	const token = "correct-horse"
	clock := newClock()
	now := clock.now().Unix()
	at := func(d int64) string { return strconv.FormatInt(now+d, 10) }
	signed := func(method, key, expires string) string {
		return "/blob/" + key + "?expires=" + expires + "&sig=" + sign(token, method, key, expires)
	}
	for _, public := range []bool{false, true} {
		s := serveAt(t, testConfig(t, func(c *config) { c.AuthToken, c.PublicRead, c.LogLevel = token, public, "debug" }), stallTimeout, clock.now)
		s.want(201, "PUT", "/blob/k", []byte("v"), "Authorization", "Bearer "+token)
		s.want(201, "PUT", "/blob/a/b", []byte("v"), "Authorization", "bearer  "+token)
		readable := 401
		if public {
			readable = 200
		}
		for _, c := range []struct {
			code                int
			method, path, token string // the header, "" for none
		}{
			{readable, "GET", "/blob/k", ""}, {readable, "HEAD", "/blob/k", ""}, {401, "PUT", "/blob/k", ""}, {401, "POST", "/blob/k", ""}, {401, "DELETE", "/blob/k", ""},
			{401, "GET", "/blob/", ""}, {401, "GET", "/", ""}, {401, "GET", "/metrics", ""}, {401, "GET", "/nothing", ""}, {401, "PATCH", "/blob/k", ""}, {401, "GET", "/blob//x", ""},
			{401, "OPTIONS", "/blob/k", ""}, {200, "GET", "/healthz", ""}, {200, "GET", "/readyz", ""}, {200, "HEAD", "/healthz", ""},
			{200, "GET", "/blob/k", "Bearer " + token}, {200, "GET", "/blob/", "BEARER " + token}, {200, "GET", "/metrics", "Bearer " + token}, {404, "GET", "/nothing", "Bearer " + token},
			{401, "GET", "/blob/k", "Bearer wrong"}, {401, "GET", "/blob/k", "Bearer"}, {401, "GET", "/blob/k", "Basic " + token}, {401, "GET", "/blob/k", token},
			{401, "GET", "/blob/k", "Bearer " + token + "x"}, {401, "GET", "/blob/k", "Bearer " + token[:5]}, {401, "GET", "/healthz", "Bearer wrong"}, {401, "GET", "/readyz", "Bearer wrong"},
			{200, "GET", signed("GET", "k", at(10)), ""}, {200, "HEAD", signed("GET", "k", at(10)), ""}, {200, "HEAD", signed("HEAD", "k", at(10)), ""}, {200, "GET", signed("GET", "a/b", at(10)), ""},
			{401, "GET", signed("HEAD", "k", at(10)), ""}, {401, "GET", signed("PUT", "k", at(10)), ""}, {401, "PUT", signed("GET", "k", at(10)), ""}, {401, "POST", signed("PUT", "k", at(10)), ""},
			{201, "PUT", signed("PUT", "k", at(10)), ""}, {201, "POST", signed("POST", "k", at(10)), ""}, {204, "DELETE", signed("DELETE", "none", at(10)), ""},
			{401, "GET", signed("GET", "k", at(0)), ""}, {401, "GET", signed("GET", "k", at(-1)), ""}, {200, "GET", signed("GET", "k", at(1)), ""}, {401, "GET", signed("GET", "k", "soon"), ""},
			{401, "GET", strings.Replace(signed("GET", "a/b", at(10)), "a/b", "k", 1), ""}, {401, "GET", strings.Replace(signed("GET", "k", at(10)), "expires=", "expires=1", 1), ""},
			{401, "GET", signed("GET", "k", at(10)) + "0", ""}, {401, "GET", signed("GET", "k", at(10)) + "&ttl=1", ""}, {401, "PUT", signed("PUT", "k", at(10)) + "&ttl=1h", ""},
			{401, "GET", "/blob/k?sig=", ""}, {401, "GET", "/blob/k?sig=00&sig=11", ""}, {401, "GET", signed("GET", "", at(10)), ""},
			{200, "GET", signed("GET", "k", at(10)), "Bearer " + token}, {401, "GET", signed("GET", "k", at(10)), "Bearer wrong"},
			{401, "GET", signed("GET", "k", at(0)), "Bearer " + token}, {401, "GET", "/blob/?sig=00", "Bearer " + token},
		} {
			headers := []string{"Authorization", c.token}
			if c.token == "" {
				headers = nil
			}
			resp, body := s.want(c.code, c.method, c.path, []byte("v"), headers...)
			if c.code == 401 && (resp.Header.Get("WWW-Authenticate") != "Bearer" || c.method != "HEAD" && string(body) != "unauthorized\n") {
				t.Errorf("%s %s: %v %q", c.method, c.path, resp.Header, body)
			}
		}
		s.want(401, "GET", "/blob/k", nil, "Authorization", "Bearer "+token, "Authorization", "Bearer "+token)
		s.stop()
		if log := s.log.String(); strings.Contains(log, token) || strings.Contains(log, "sig=") || strings.Contains(log, "expires") {
			t.Errorf("a secret in the log: %s", log)
		}
	}
}

// What sign prints works, for every key.
func TestSign(t *testing.T) {
	s := newTestServer(t, func(c *config) { c.AuthToken = "sekret" })
	t.Chdir(t.TempDir())
	for _, key := range []string{"k", "photos/2026/cat.jpg", "a//b", "../x", ".", "a/./b", "/", "a b", "ä/日本", "%2F", "a?b#c&d=e+f", "\x01\x7f", "'\"", "a/"} {
		for _, method := range []string{"PUT", "GET"} {
			var stdout, stderr bytes.Buffer
			env := []string{"BLOBNOM_AUTH_TOKEN=sekret"}
			if code := run(t.Context(), []string{"sign", "-method", method, "-ttl", "1m", key}, env, &stdout, &stderr); code != 0 {
				t.Fatalf("%q: code %d, %s", key, code, &stderr)
			}
			path := strings.TrimSuffix(stdout.String(), "\n")
			if method == "PUT" {
				s.want(201, method, path, []byte(key))
			} else if _, got := s.want(200, method, path, nil); string(got) != key {
				t.Errorf("%q: %q", key, got)
			}
			s.want(401, "DELETE", path, nil)
		}
	}
}

func TestCORS(t *testing.T) {
	s := newTestServer(t, func(c *config) { c.AuthToken, c.PublicRead, c.CORSOrigin = "sekret", true, "https://example.org" })
	for _, path := range []string{"/blob/k", "/blob/a//b", "/"} {
		resp, body := s.want(204, "OPTIONS", path, nil, "Origin", "https://example.org", "Access-Control-Request-Method", "PUT", "Access-Control-Request-Headers", "authorization")
		h := resp.Header
		if h.Get("Access-Control-Allow-Origin") != "https://example.org" || !strings.Contains(h.Get("Access-Control-Allow-Methods"), "PUT") ||
			!strings.Contains(h.Get("Access-Control-Allow-Headers"), "Authorization") || len(body) > 0 {
			t.Errorf("%s: %v", path, h)
		}
	}
	s.want(401, "OPTIONS", "/blob/k", nil)
	s.want(201, "PUT", "/blob/k", []byte("v"), "Authorization", "Bearer sekret")
	for code, path := range map[int]string{200: "/blob/k", 404: "/blob/none", 401: "/metrics"} {
		resp, _ := s.want(code, "GET", path, nil)
		exposed := resp.Header.Get("Access-Control-Expose-Headers")
		if resp.Header.Get("Access-Control-Allow-Origin") != "https://example.org" || !strings.Contains(exposed, "Blob-Version") || !strings.Contains(exposed, "Etag") {
			t.Errorf("%s: %v", path, resp.Header)
		}
	}
	off := newTestServer(t)
	resp, _ := off.want(405, "OPTIONS", "/blob/k", nil, "Origin", "https://example.org", "Access-Control-Request-Method", "PUT")
	if resp.Header.Get("Access-Control-Allow-Origin") != "" {
		t.Error(resp.Header)
	}
}

// writePair writes a new certificate and its key, and returns the certificate.
func writePair(t *testing.T, cert, key string) *x509.Certificate {
	private, err := ecdsa.GenerateKey(elliptic.P256(), crand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(rand.Int64()), NotAfter: time.Now().Add(time.Hour), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(crand.Reader, template, template, private.Public(), private)
	if err != nil {
		t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	for name, block := range map[string]*pem.Block{cert: {Type: "CERTIFICATE", Bytes: der}, key: {Type: "PRIVATE KEY", Bytes: pkcs8}} {
		if err := os.WriteFile(name, pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	parsed, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return parsed
}

func TestTLS(t *testing.T) {
	cert, key := filepath.Join(t.TempDir(), "cert.pem"), filepath.Join(t.TempDir(), "key.pem")
	first := writePair(t, cert, key)
	s := newTestServer(t, func(c *config) { c.TLSCert, c.TLSKey = cert, key })
	s.base = strings.Replace(s.base, "http:", "https:", 1)
	request := func(trusted *x509.Certificate, http2 bool) error {
		roots := x509.NewCertPool()
		roots.AddCert(trusted)
		transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}, ForceAttemptHTTP2: http2}
		defer transport.CloseIdleConnections()
		c := &http.Client{Transport: transport}
		body := noise(3*chunkSize, 1)
		req, _ := http.NewRequest("PUT", s.base+"/blob/k", bytes.NewReader(body))
		resp, err := c.Do(req)
		if err != nil {
			return err
		}
		resp.Body.Close()
		if resp, err = c.Get(s.base + "/blob/k"); err != nil {
			return err
		}
		defer resp.Body.Close()
		if got, err := io.ReadAll(resp.Body); err != nil || !bytes.Equal(got, body) || (resp.ProtoMajor == 2) != http2 {
			t.Errorf("%s: %d bytes, %v", resp.Proto, len(got), err)
		}
		return nil
	}
	for _, http2 := range []bool{true, false} {
		if err := request(first, http2); err != nil {
			t.Error(err)
		}
	}
	if err := os.WriteFile(cert, []byte("half a file"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := request(first, true); err != nil {
		t.Error("with a broken new file:", err)
	}
	second := writePair(t, cert, key)
	if err := request(second, true); err != nil {
		t.Error("the new certificate is not served:", err)
	}
	if err := request(first, true); err == nil {
		t.Error("the old certificate is served")
	}
}

// metrics scrapes the server: sample to value.
func (s *testServer) metrics() map[string]float64 {
	s.t.Helper()
	resp, body := s.want(200, "GET", "/metrics", nil)
	if ct := resp.Header.Get("Content-Type"); ct != "text/plain; version=0.0.4; charset=utf-8" {
		s.t.Error(ct)
	}
	samples, typed := map[string]float64{}, map[string]string{}
	for line := range strings.Lines(string(body)) {
		line = strings.TrimSuffix(line, "\n")
		if rest, ok := strings.CutPrefix(line, "# TYPE "); ok {
			name, kind, _ := strings.Cut(rest, " ")
			if typed[name] != "" || kind != "gauge" && kind != "counter" && kind != "histogram" || (kind == "counter") != strings.HasSuffix(name, "_total") {
				s.t.Error(line)
			}
			typed[name] = kind
		} else if !strings.HasPrefix(line, "# HELP ") {
			i := strings.LastIndexByte(line, ' ')
			v, err := strconv.ParseFloat(line[i+1:], 64)
			name, _, _ := strings.Cut(line[:i], "{")
			for _, suffix := range []string{"_bucket", "_sum", "_count"} {
				if base := strings.TrimSuffix(name, suffix); typed[base] == "histogram" {
					name = base
				}
			}
			if _, again := samples[line[:i]]; err != nil || again || typed[name] == "" {
				s.t.Errorf("%s: %v", line, err)
			}
			samples[line[:i]] = v
		}
	}
	return samples
}

func TestMetrics(t *testing.T) {
	s := newTestServer(t, func(c *config) { c.NumShards = 2 })
	small, large := noise(100, 1), noise(3*chunkSize, 2)
	a, b := s.keyOn(0, "a"), s.keyOn(1, "b")
	s.put(a, small)
	s.put(a, small[:40])
	s.put(b, large)
	s.wantBlob(b, large)
	s.want(404, "GET", "/blob/none", nil)
	s.want(400, "GET", "/blob//x", nil)
	s.want(405, "PATCH", "/blob/x", nil)
	s.want(405, "BREW", "/blob/x", nil)
	s.want(404, "GET", "/nothing/at/all", nil)
	s.want(204, "DELETE", "/blob/"+b, nil)
	eventually(t, "the chunks are swept", func() bool { return s.metrics()[`blobnom_shard_orphans{shard="1"}`] == 0 })
	m := s.metrics()
	for sample, want := range map[string]float64{
		`blobnom_http_requests_total{route="/blob/{key...}",method="PUT",code="201"}`:         3,
		`blobnom_http_requests_total{route="/blob/{key...}",method="GET",code="200"}`:         1,
		`blobnom_http_requests_total{route="/blob/{key...}",method="GET",code="404"}`:         1,
		`blobnom_http_requests_total{route="/blob/{key...}",method="DELETE",code="204"}`:      1,
		`blobnom_http_requests_total{route="/blob/{key...}",method="other",code="405"}`:       2,
		`blobnom_http_requests_total{route="none",method="GET",code="400"}`:                   1,
		`blobnom_http_requests_total{route="/",method="GET",code="404"}`:                      1,
		`blobnom_http_request_duration_seconds_count{route="/blob/{key...}"}`:                 8,
		`blobnom_http_request_duration_seconds_bucket{route="/blob/{key...}",le="+Inf"}`:      8,
		`blobnom_http_received_bytes_total`:                                                   140 + 3*chunkSize,
		`blobnom_batch_operations_count`:                                                      m["blobnom_commit_duration_seconds_count"],
		`blobnom_batch_operations_sum`:                                                        3 + 2 + 1, // puts, chunks before the last, delete
		`blobnom_batch_operations_bucket{le="1"}`:                                             6,
		`blobnom_shard_blobs{shard="0"}`:                                                      1,
		`blobnom_shard_blobs{shard="1"}`:                                                      0,
		`blobnom_shard_content_bytes{shard="0"}`:                                              40,
		`blobnom_shard_content_bytes{shard="1"}`:                                              0,
		`blobnom_failed_background_writes_total{shard="0"}`:                                   0,
		`blobnom_queue_operations{shard="0"}`:                                                 0,
		`blobnom_queue_bytes`:                                                                 0,
		`blobnom_build_info{version="` + version + `",goversion="` + runtime.Version() + `"}`: 1,
	} {
		if got, there := m[sample]; !there || got != want {
			t.Errorf("%s %v, want %v", sample, got, want)
		}
	}
	for _, sample := range []string{`blobnom_shard_file_bytes{shard="1"}`, `blobnom_shard_wal_bytes{shard="1"}`, `go_goroutines`, `go_memstats_heap_alloc_bytes`, `blobnom_http_sent_bytes_total`} {
		if m[sample] <= 0 {
			t.Errorf("%s %v", sample, m[sample])
		}
	}
	before := len(m)
	for i := range 50 { // neither keys nor paths make new samples
		s.do("GET", fmt.Sprint("/blob/k", i), nil)
		s.do("GET", fmt.Sprint("/x", i), nil)
	}
	if after := len(s.metrics()); after > before+1 { // that of /metrics itself is new
		t.Errorf("%d samples became %d", before, after)
	}
	// Of a shard that cannot say how much it has, the rest is told.
	path := filepath.Join(s.store.dir, shardName(1))
	exec1(t, path, "UPDATE totals SET blobs = 'x'")
	m = s.metrics()
	for sample, want := range map[string]bool{`blobnom_shard_blobs{shard="0"}`: true, `blobnom_shard_blobs{shard="1"}`: false, `blobnom_shard_file_bytes{shard="1"}`: true} {
		if _, there := m[sample]; there != want {
			t.Errorf("%s: %v", sample, there)
		}
	}
	exec1(t, path, "UPDATE totals SET blobs = (SELECT count(*) FROM blobs)")
}

// A client that makes no progress is cut off; one that is slow is not.
func TestStalledClients(t *testing.T) {
	s := serveConfig(t, testConfig(t), 400*time.Millisecond)
	s.put("big", noise(64<<20, 1))
	dial := func(request string) net.Conn {
		c, err := net.Dial("tcp", strings.TrimPrefix(s.base, "http://"))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		c.SetDeadline(time.Now().Add(20 * time.Second))
		fmt.Fprint(c, request)
		return c
	}
	up := dial("PUT /blob/up HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\nabc")
	if n, err := io.Copy(io.Discard, up); errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("stalled upload: not cut off, %d bytes, %v", n, err)
	}
	down := dial("GET /blob/big HTTP/1.1\r\nHost: x\r\n\r\n")
	held := func() int {
		sh, _ := s.store.shardOf("big")
		sh.heldMu.Lock()
		defer sh.heldMu.Unlock()
		return len(sh.held)
	}
	eventually(t, "the download begins", func() bool { return held() > 0 })
	eventually(t, "the stalled download lets go of its content", func() bool { return held() == 0 })
	if n, err := io.Copy(io.Discard, down); n >= 64<<20 || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("stalled download: got %d bytes, %v", n, err)
	}
	slow := dial("PUT /blob/slow HTTP/1.1\r\nHost: x\r\nContent-Length: 12\r\n\r\n")
	for range 12 {
		time.Sleep(100 * time.Millisecond) // a slow client
		fmt.Fprint(slow, "x")
	}
	if line, err := bufio.NewReader(slow).ReadString('\n'); !strings.Contains(line, " 201 ") {
		t.Errorf("slow upload: %q %v", line, err)
	}
	s.want(404, "GET", "/blob/up", nil)
}

// ============================================================================
// Store
// ============================================================================

func TestPlacement(t *testing.T) {
	for _, c := range []struct {
		hash, key string
		want      uint64
	}{
		{"fnv1a", "hello", 0xa430d84680aabd0b}, {"fnv1a", "", 0xcbf29ce484222325}, {"fnv1a", "a", 0xaf63dc4c8601ec8c},
		{"crc32c", "123456789", 0xe3069283}, {"sha256", "abc", 0xba7816bf8f01cfea},
	} {
		if got := hashes[c.hash](c.key); got != c.want {
			t.Errorf("%s(%q) = %x, want %x", c.hash, c.key, got, c.want)
		}
	}
}

// The storage contract: what is put comes back, whatever the store is made of.
func TestStorage(t *testing.T) {
	sizes := []int{0, 1, 4096, smallBody - 1, smallBody, smallBody + 1, chunkSize - 1, chunkSize, chunkSize + 1, 2 * chunkSize, 5*chunkSize + 7}
	for _, shards := range []int64{1, 4} {
		for _, durability := range []string{"full", "normal", "off"} {
			for _, hash := range []string{"fnv1a", "crc32c", "sha256"} {
				cfg := testConfig(t, func(c *config) { c.NumShards, c.Durability, c.Hash = shards, durability, hash })
				s := serveConfig(t, cfg, stallTimeout)
				for i, size := range sizes {
					s.put(fmt.Sprint("k/", size), noise(size, 1))
					resp, _, err := s.do("PUT", fmt.Sprint("/blob/chunked/", size), unknownLength(noise(size, 2)))
					if err != nil || resp.StatusCode != 201 {
						t.Fatal(resp, err)
					}
					s.put("replaced", noise(sizes[len(sizes)-1-i], 3)) // large by small and back
					s.wantBlob("replaced", noise(sizes[len(sizes)-1-i], 3))
				}
				if err := s.stop(); err != nil {
					t.Fatal(err)
				}
				s = serveConfig(t, cfg, stallTimeout)
				for _, size := range sizes {
					s.wantBlob(fmt.Sprint("k/", size), noise(size, 1))
					s.wantBlob(fmt.Sprint("chunked/", size), noise(size, 2))
				}
			}
		}
	}
}

// snapshot maps every file in dir to its content's hash.
func snapshot(t *testing.T, dir string) map[string]string {
	t.Helper()
	files := map[string]string{}
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		data, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err != nil {
			t.Fatal(err)
		}
		files[e.Name()] = fmt.Sprintf("%x", sha256.Sum256(data))
	}
	return files
}

func TestRefusedDirectories(t *testing.T) {
	rust := func(t *testing.T, dir string, n int, create string) {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		for i := range n {
			exec1(t, filepath.Join(dir, shardName(i)), create)
		}
	}
	shard := func(cfg *config, i int) string { return filepath.Join(cfg.DataDir, shardName(i)) }
	unplaced := func(cfg *config, i int) string { return filepath.Join(cfg.DataDir, newDir, shardName(i)) }
	for _, c := range []struct {
		name  string
		spoil func(t *testing.T, cfg *config) // of a directory with four shards
		want  []string                        // in the error; none: it opens
	}{
		{"as it was", func(t *testing.T, cfg *config) {}, nil},
		{"other count", func(t *testing.T, cfg *config) { cfg.NumShards = 8 }, []string{"holds 4 shards", "num_shards = 8", "blobnom migrate"}},
		{"fewer", func(t *testing.T, cfg *config) { cfg.NumShards = 2 }, []string{"holds 4 shards", "num_shards = 2", "blobnom migrate"}},
		{"other hash", func(t *testing.T, cfg *config) { cfg.Hash = "sha256" }, []string{"placed by fnv1a", `hash = "sha256"`, "blobnom migrate"}},
		{"last missing", func(t *testing.T, cfg *config) { os.Remove(shard(cfg, 3)) }, []string{"shard_3.db is missing", "backup"}},
		{"first missing", func(t *testing.T, cfg *config) { os.Remove(shard(cfg, 0)) }, []string{"shard_0.db is missing", "backup"}},
		{"swapped", func(t *testing.T, cfg *config) {
			os.Rename(shard(cfg, 1), shard(cfg, 9))
			os.Rename(shard(cfg, 2), shard(cfg, 1))
			os.Rename(shard(cfg, 9), shard(cfg, 2))
		}, []string{"belongs elsewhere"}},
		{"from another", func(t *testing.T, cfg *config) {
			other := testConfig(t)
			serveConfig(t, other, stallTimeout).stop()
			os.Rename(shard(other, 2), shard(cfg, 2))
			os.RemoveAll(other.DataDir)
		}, []string{"shard_2.db belongs elsewhere"}},
		{"one too many", func(t *testing.T, cfg *config) { copyFile(t, shard(cfg, 1), shard(cfg, 4)) }, []string{"shard_4.db does not belong"}},
		{"newer schema", func(t *testing.T, cfg *config) { exec1(t, shard(cfg, 1), "PRAGMA user_version = 2") }, []string{"version 2", "newer server"}},
		{"unrelated files", func(t *testing.T, cfg *config) {
			os.WriteFile(filepath.Join(cfg.DataDir, "shard_x.db"), []byte("x"), 0o600)
			os.WriteFile(filepath.Join(cfg.DataDir, "shard_01.db"), []byte("x"), 0o600)
			os.Mkdir(filepath.Join(cfg.DataDir, ".shard_0.db-litestream"), 0o755)
			exec1(t, shard(cfg, 0), "CREATE TABLE _litestream_seq (id INTEGER PRIMARY KEY)")
		}, nil},
		{"all damaged", func(t *testing.T, cfg *config) {
			for i := range 4 {
				os.WriteFile(shard(cfg, i), []byte("garbage"), 0o600)
			}
		}, []string{"no shard", "backup"}},
		{"unfinished creation", func(t *testing.T, cfg *config) {
			os.Mkdir(filepath.Join(cfg.DataDir, newDir), 0o755)
			for i := range 4 {
				os.Rename(shard(cfg, i), unplaced(cfg, i))
			}
			os.WriteFile(unplaced(cfg, 1)+"-journal", nil, 0o600)
			os.Remove(unplaced(cfg, 3))
		}, nil},
		{"half placed", func(t *testing.T, cfg *config) {
			os.Mkdir(filepath.Join(cfg.DataDir, newDir), 0o755)
			os.Rename(shard(cfg, 2), unplaced(cfg, 2))
			os.Rename(shard(cfg, 3), unplaced(cfg, 3))
		}, nil},
		{"a shard staged beside", func(t *testing.T, cfg *config) {
			copyFile(t, shard(cfg, 0), shard(cfg, 0)+".new")
			os.Mkdir(shard(cfg, 7), 0o755)
		}, nil},
		{"rust", func(t *testing.T, cfg *config) {
			cfg.DataDir = t.TempDir()
			rust(t, cfg.DataDir, 4, "PRAGMA journal_mode=WAL; CREATE TABLE blobs (key TEXT PRIMARY KEY, data BLOB); INSERT INTO blobs VALUES ('k', 'v')")
		}, []string{"Rust Blobnom", "blobnom migrate"}},
		{"rust with metadata", func(t *testing.T, cfg *config) {
			cfg.DataDir = t.TempDir()
			rust(t, cfg.DataDir, 2, "CREATE TABLE blobs (key TEXT PRIMARY KEY, data BLOB, created_at INTEGER, updated_at INTEGER, expires_at INTEGER, version INTEGER)")
		}, []string{"Rust Blobnom", "blobnom migrate"}},
		{"rust never closed", func(t *testing.T, cfg *config) {
			cfg.DataDir = t.TempDir()
			other := t.TempDir()
			db := openDB(filepath.Join(other, "a.db"), "")
			defer db.Close()
			if _, err := db.Exec("PRAGMA journal_mode=WAL; CREATE TABLE blobs (key TEXT PRIMARY KEY, data BLOB)"); err != nil {
				t.Fatal(err)
			}
			copyFile(t, filepath.Join(other, "a.db"), shard(cfg, 0))
			copyFile(t, filepath.Join(other, "a.db-wal"), shard(cfg, 0)+"-wal")
		}, []string{"Rust Blobnom", "blobnom migrate"}},
		{"another program", func(t *testing.T, cfg *config) {
			cfg.DataDir = t.TempDir()
			rust(t, cfg.DataDir, 1, "CREATE TABLE notes (x)")
		}, []string{"another program"}},
		{"a file", func(t *testing.T, cfg *config) {
			cfg.DataDir = filepath.Join(t.TempDir(), "f")
			os.WriteFile(cfg.DataDir, nil, 0o600)
		}, []string{"data_dir"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			cfg := testConfig(t)
			s := serveConfig(t, cfg, stallTimeout)
			if c.name != "unfinished creation" {
				s.put("k", []byte("v"))
			}
			if err := s.stop(); err != nil {
				t.Fatal(err)
			}
			was := *cfg
			c.spoil(t, cfg)
			foreign := cfg.DataDir != was.DataDir && c.name != "a file"
			var before map[string]string
			if foreign {
				before = snapshot(t, cfg.DataDir)
			}
			st, err := openStore(cfg, slog.New(slog.DiscardHandler), time.Now)
			if err == nil {
				if c.name != "unfinished creation" {
					sh, _ := st.shardOf("k")
					if _, err := sh.read("k", false); err != nil {
						t.Error("the blob is gone:", err)
					}
				}
				err = st.close()
				if c.want != nil {
					t.Fatal("opened")
				}
			}
			for _, want := range c.want {
				if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "\n") {
					t.Errorf("%v, want %q on one line", err, want)
				}
			}
			if c.want == nil && err != nil {
				t.Error(err)
			}
			if foreign && !maps.Equal(before, snapshot(t, cfg.DataDir)) {
				t.Error("the directory was changed")
			}
			os.RemoveAll(was.DataDir) // spoilt: not for the harness to verify
		})
	}
}

func exec1(t testing.TB, path, query string) {
	t.Helper()
	db := openDB(path, "_pragma=busy_timeout(5000)")
	defer db.Close()
	db.SetMaxOpenConns(1)
	if _, err := db.Exec(query); err != nil {
		t.Fatal(err)
	}
}

func copyFile(t *testing.T, from, to string) {
	t.Helper()
	data, err := os.ReadFile(from)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(to, data, 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestOneServerPerDirectory(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "data")
	p := startProgram(t, dir)
	var stdout, stderr bytes.Buffer
	start := time.Now()
	code := run(t.Context(), nil, []string{"BLOBNOM_ADDR=127.0.0.1:0", "BLOBNOM_DATA_DIR=" + dir}, &stdout, &stderr)
	if code != 1 || !strings.Contains(stderr.String(), "in use by another blobnom") || time.Since(start) > 2*time.Second {
		t.Errorf("code %d after %v: %s", code, time.Since(start), &stderr)
	}
	p.put("k", []byte("v"))
	p.cmd.Process.Kill()
	<-p.done
	startProgram(t, dir).wantBlob("k", []byte("v")) // the lock died with its owner
}

func TestCorruptShard(t *testing.T) {
	for name, spoil := range map[string]func(data []byte) []byte{
		"header":         func(data []byte) []byte { copy(data, "garbage garbage garbage"); return data },
		"application id": func(data []byte) []byte { copy(data[40:100], noise(60, 1)); return data },
		"emptied":        func(data []byte) []byte { return nil },
		"tables":         func(data []byte) []byte { copy(data[4096:], bytes.Repeat([]byte("x"), len(data))); return data },
	} {
		t.Run(name, func(t *testing.T) {
			cfg := testConfig(t)
			s := serveConfig(t, cfg, stallTimeout)
			bad, good := s.keyOn(1, "k"), s.keyOn(2, "k")
			s.put(bad, noise(9000, 1))
			s.put(good, noise(9000, 2))
			s.stop()
			file := filepath.Join(cfg.DataDir, shardName(1))
			data, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(file, spoil(data), 0o600); err != nil {
				t.Fatal(err)
			}
			s = serveConfig(t, cfg, stallTimeout)
			if _, body := s.want(500, "GET", blobPath(bad), nil); string(body) != "shard is corrupt\n" {
				t.Errorf("%q", body)
			}
			s.want(500, "HEAD", blobPath(bad), nil)
			s.want(500, "PUT", blobPath(bad), []byte("x"))
			s.want(503, "GET", "/readyz", nil)
			s.want(500, "DELETE", blobPath(bad), nil)
			s.wantBlob(good, noise(9000, 2))
			s.put(good, []byte("new"))
			_, body := s.want(503, "GET", "/readyz", nil)
			if !strings.Contains(string(body), `{"shard":1,"ready":false,"error":"shard is corrupt"`) || strings.Contains(string(body), cfg.DataDir) {
				t.Errorf("%s", body)
			}
			if n := strings.Count(s.log.String(), "status=500"); n != 4 {
				t.Errorf("%d log lines with status=500, want one a request:\n%s", n, s.log)
			}
			s.stop()
			os.RemoveAll(cfg.DataDir)
		})
	}
}

// ============================================================================
// Shard
// ============================================================================

// A chunk that is missing or short ends the download visibly.
func TestDamagedContent(t *testing.T) {
	s := newTestServer(t, func(c *config) { c.NumShards = 1 })
	body := noise(3*chunkSize, 1)
	for _, damage := range []string{"DELETE FROM chunks WHERE id & 1048575 = 1", "UPDATE chunks SET data = substr(data, 2) WHERE id & 1048575 = 2"} {
		s.put("k", body)
		exec1(t, filepath.Join(s.store.dir, shardName(0)), damage)
		if resp, got, err := s.do("GET", "/blob/k", nil); err == nil {
			t.Errorf("%s: %s and %d bytes without an error", damage, resp.Status, len(got))
		}
		s.want(206, "GET", "/blob/k", nil, "Range", "bytes=0-100")
	}
	exec1(t, filepath.Join(s.store.dir, shardName(0)), "DELETE FROM chunks")
	s.want(500, "GET", "/blob/k", nil)
	s.want(204, "DELETE", "/blob/k", nil)
}

// Downloads that run while their blob is replaced or deleted end whole.
func TestReplacedWhileDownloaded(t *testing.T) {
	s := newTestServer(t, func(c *config) { c.NumShards = 1 })
	old := noise(40*chunkSize, 1) // more than the sockets buffer
	s.put("k", old)
	var bodies []io.ReadCloser
	for range 3 {
		resp, err := http.Get(s.base + "/blob/k")
		if err != nil {
			t.Fatal(err)
		}
		bodies = append(bodies, resp.Body)
	}
	s.put("k", noise(2*chunkSize, 2))
	s.want(204, "DELETE", "/blob/k", nil)
	s.put("k", []byte("new"))
	// The sweep comes by, takes what nobody reads and leaves the rest.
	eventually(t, "the unread content is swept", func() bool { return countRows(t, s.store.dir, "SELECT count(*) FROM chunks") == 40 })
	for _, b := range bodies {
		got, err := io.ReadAll(b)
		b.Close()
		if err != nil || !bytes.Equal(got, old) {
			t.Errorf("%d bytes, %v: not the old content", len(got), err)
		}
	}
	s.wantBlob("k", []byte("new"))
	eventually(t, "the old contents are swept", func() bool { return countRows(t, s.store.dir, "SELECT count(*) FROM chunks") == 0 })
}

// An upload that breaks off leaves nothing visible, and its space comes back.
func TestAbortedUpload(t *testing.T) {
	s := newTestServer(t, func(c *config) { c.NumShards = 1 })
	s.put("k", []byte("old"))
	size := func() int64 {
		return countRows(t, s.store.dir, "SELECT (page_count - freelist_count) FROM pragma_page_count, pragma_freelist_count")
	}
	before := size()
	for _, announced := range []int64{40 * chunkSize, -1} {
		r, w := io.Pipe()
		req, _ := http.NewRequest("PUT", s.base+"/blob/k", r)
		req.ContentLength = announced
		failed := make(chan error)
		go func() {
			_, err := client.Do(req)
			failed <- err
		}()
		w.Write(noise(20*chunkSize, 1))
		eventually(t, "chunks arrive", func() bool { return countRows(t, s.store.dir, "SELECT count(*) FROM chunks") > 10 })
		w.CloseWithError(errors.New("gone"))
		if err := <-failed; err == nil {
			t.Error("the upload succeeded")
		}
	}
	s.wantBlob("k", []byte("old"))
	eventually(t, "chunks and orphans are gone and the file shrinks", func() bool {
		return countRows(t, s.store.dir, "SELECT (SELECT count(*) FROM chunks) + (SELECT count(*) FROM orphans)") == 0 && size() <= before+2 &&
			countRows(t, s.store.dir, "PRAGMA page_count") < before+2*vacuumPages
	})
}

// What an earlier run left in orphans goes soon after the start.
func TestOrphansOfEarlierRun(t *testing.T) {
	cfg := testConfig(t, func(c *config) { c.NumShards = 1 })
	serveConfig(t, cfg, stallTimeout).stop()
	exec1(t, filepath.Join(cfg.DataDir, shardName(0)), `INSERT INTO orphans VALUES (77);
		WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i+1 FROM n WHERE i < 50) INSERT INTO chunks SELECT (77<<20)+i, randomblob(262144) FROM n`)
	s := serveConfig(t, cfg, stallTimeout)
	s.put("k", noise(2*chunkSize, 1)) // takes a content id of its own
	eventually(t, "swept", func() bool { return countRows(t, cfg.DataDir, "SELECT count(*) FROM chunks") == 2 })
	s.wantBlob("k", noise(2*chunkSize, 1))
}

// A slice of upkeep gets somewhere, however long it waited for a lock.
func TestSliceAfterLongWait(t *testing.T) {
	s := newTestServer(t, func(c *config) { c.NumShards = 1 })
	time.AfterFunc(10*sliceTime, s.lockShard())
	err := s.store.shards[0].slice(func(w *writer) error {
		swept, err := w.sweep(func() (int64, error) { return 77, nil })
		if !swept {
			t.Error("nothing was swept")
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// One operation that fails does so alone.
func TestBadOperationFailsAlone(t *testing.T) {
	s := newTestServer(t, func(c *config) { c.NumShards = 1 })
	sh := s.store.shards[0]
	boom := errors.New("boom")
	block, inside := make(chan struct{}), make(chan struct{})
	gate := &op{alone: func(*writer) error { close(inside); <-block; return nil }}
	sh.batcher.add(gate)
	<-inside // what is added now forms one batch
	var ops []*op
	for i := range 9 {
		o := &op{key: fmt.Sprint("k", i), apply: (*writer).put, blob: &blob{size: 1, stored: 1}, data: []byte("x")}
		o.blob.data, o.blob.sum = o.data, sha256.Sum256(o.data)
		if i == 4 {
			put := o.apply
			o.apply = func(w *writer, o *op) error { return cmp.Or(put(w, o), boom) } // written, then failed
		}
		sh.batcher.add(o)
		ops = append(ops, o)
	}
	close(block)
	for i, o := range ops {
		<-o.done
		if (i == 4) != errors.Is(o.err, boom) || i != 4 && o.err != nil {
			t.Errorf("operation %d: %v", i, o.err)
		}
		if i == 4 {
			s.want(404, "GET", "/blob/k4", nil)
		} else {
			s.wantBlob(fmt.Sprint("k", i), []byte("x"))
		}
	}
}

func TestAsync(t *testing.T) {
	// The window is long: a reader that did not hurry the batch would wait for it.
	cfg := testConfig(t, func(c *config) { c.AsyncWrite, c.BatchTimeoutMS, c.NumShards = true, 60_000, 2 })
	s := serveConfig(t, cfg, stallTimeout)
	for i, size := range []int{10, 3 * chunkSize, 0, chunkSize + 1, 20} {
		s.put("k", noise(size, uint64(i)))
		if v := s.wantBlob("k", noise(size, uint64(i))).Header.Get("Blob-Version"); v != strconv.Itoa(i) {
			t.Errorf("version %s, want %d", v, i)
		}
	}
	s.put("k", []byte("again"))
	if head, _ := s.want(200, "HEAD", "/blob/k", nil); head.ContentLength != 5 {
		t.Errorf("HEAD sees %d bytes", head.ContentLength)
	}
	s.want(202, "DELETE", "/blob/k", nil)
	s.want(404, "GET", "/blob/k", nil)
	// Many writers, one key each: what the last 202 said is what comes back.
	var wg sync.WaitGroup
	for w := range 16 {
		wg.Go(func() {
			key := fmt.Sprint("w", w)
			for i := range 50 {
				s.put(key, fmt.Append(nil, i))
				if i%7 == 0 {
					s.wantBlob(key, fmt.Append(nil, i))
				}
			}
		})
	}
	wg.Wait()
	if err := s.stop(); err != nil { // commits what is queued
		t.Fatal(err)
	}
	s = serveConfig(t, cfg, stallTimeout)
	for w := range 16 {
		if v := s.wantBlob(fmt.Sprint("w", w), []byte("49")).Header.Get("Blob-Version"); v != "49" {
			t.Errorf("version %s", v)
		}
	}
}

// A background write that fails is logged and counted, and reads tell the truth.
func TestFailedBackgroundWrite(t *testing.T) {
	s := newTestServer(t, func(c *config) { c.AsyncWrite, c.NumShards = true, 1 })
	s.put("k", []byte("old"))
	s.wantBlob("k", []byte("old"))
	file := filepath.Join(s.store.dir, shardName(0))
	exec1(t, file, "CREATE TRIGGER no BEFORE UPDATE ON blobs BEGIN SELECT raise(ABORT, 'no'); END")
	s.put("k", []byte("new"))
	s.wantBlob("k", []byte("old"))
	if _, body := s.want(503, "GET", "/readyz", nil); !strings.Contains(string(body), `"failed_background_writes":1`) {
		t.Errorf("%s", body)
	}
	if !strings.Contains(s.log.String(), "key=k ") {
		t.Errorf("not logged:\n%s", s.log)
	}
	exec1(t, file, "DROP TRIGGER no")
	s.put("k", []byte("new"))
	s.wantBlob("k", []byte("new"))
	s.want(200, "GET", "/readyz", nil)
}

// A flood waits for room, then is told so; memory stays bounded.
func TestFlood(t *testing.T) {
	s := newTestServer(t, func(c *config) { c.NumShards, c.MaxPendingBytes = 1, 3000 })
	s.store.budget.patience = 50 * time.Millisecond
	block, inside := make(chan struct{}), make(chan struct{})
	s.store.shards[0].batcher.add(&op{alone: func(*writer) error { close(inside); <-block; return nil }})
	<-inside
	answers := make(chan *http.Response)
	for i := range 6 {
		go func() {
			resp, _, err := s.do("PUT", fmt.Sprint("/blob/k", i), bytes.NewReader(noise(1000, 1)))
			if err != nil {
				t.Error(err)
			}
			answers <- resp
		}()
	}
	for range 5 { // one and a half fit
		if resp := <-answers; resp.StatusCode != 503 || resp.Header.Get("Retry-After") == "" {
			t.Errorf("%s %v", resp.Status, resp.Header)
		}
	}
	close(block)
	if resp := <-answers; resp.StatusCode != 201 {
		t.Error(resp.Status)
	}
	s.put("large", noise(2*chunkSize, 1)) // one operation always fits
}

// Another process that holds a shard's lock delays what was answered 202; who
// waits for an answer is told.
func TestForeignLock(t *testing.T) {
	t.Parallel() // it mostly waits
	for _, async := range []bool{true, false} {
		s := newTestServer(t, func(c *config) { c.AsyncWrite, c.NumShards = async, 1 })
		unlock := s.lockShard()
		if !async {
			resp, _ := s.want(503, "PUT", "/blob/k0", []byte("x"))
			if resp.Header.Get("Retry-After") == "" {
				t.Error(resp.Header)
			}
		} else {
			for i := range 5 {
				s.put(fmt.Sprint("k", i), []byte("v"))
			}
			time.Sleep(busyTimeout + time.Second) // longer than SQLite waits
		}
		unlock()
		for i := range 5 {
			if async {
				s.wantBlob(fmt.Sprint("k", i), []byte("v"))
			}
		}
		s.put("k0", []byte("w"))
	}
}

// mount makes a small file system, where the test may.
func mount(t *testing.T, size string) string {
	t.Helper()
	dir := t.TempDir()
	if out, err := exec.Command("mount", "-t", "tmpfs", "-o", "size="+size, "tmpfs", dir).CombinedOutput(); err != nil {
		t.Skipf("cannot mount: %v %s", err, out)
	}
	t.Cleanup(func() {
		if out, err := exec.Command("umount", "-l", dir).CombinedOutput(); err != nil {
			t.Errorf("umount: %v %s", err, out)
		}
	})
	return dir
}

func TestDiskFull(t *testing.T) {
	for _, size := range []int{3000, 200_000, 1 << 20} {
		for _, async := range []bool{false, true} {
			t.Run(fmt.Sprintf("%d bytes, async %v", size, async), func(t *testing.T) {
				cfg := testConfig(t, func(c *config) { c.DataDir, c.AsyncWrite = filepath.Join(mount(t, "32m"), "data"), async })
				s := serveConfig(t, cfg, stallTimeout)
				stored := fill(t, s, size)
				if !async { // where another shard's queued write may have found room since
					s.want(503, "GET", "/readyz", nil)
				}
				for i, key := range stored {
					if i%50 == 0 {
						s.wantBlob(key, noise(size, 1))
					}
				}
				// A restart on the full disk changes nothing.
				s.stop()
				s = serveConfig(t, cfg, stallTimeout)
				half := len(stored) / 2
				for _, key := range stored[:half] {
					resp, body, err := s.do("DELETE", blobPath(key), nil)
					if err != nil || resp.StatusCode/100 != 2 {
						t.Fatalf("DELETE: %v %s %v", resp, body, err)
					}
				}
				// The space comes back and writes work again, on every shard.
				for shard := range 4 {
					key := s.keyOn(shard, "again")
					eventually(t, "a write works again", func() bool {
						resp, _, err := s.do("PUT", blobPath(key), bytes.NewReader(noise(size, 2)))
						if err != nil || resp.StatusCode != 507 && resp.StatusCode/100 != 2 {
							t.Fatal(resp, err)
						}
						got, body, err := s.do("GET", blobPath(key), nil) // a 202 may have failed after all
						return err == nil && got.StatusCode == 200 && bytes.Equal(body, noise(size, 2))
					})
				}
				eventually(t, "ready", func() bool {
					resp, _, err := s.do("GET", "/readyz", nil)
					return err == nil && resp.StatusCode == 200
				})
				for _, key := range stored[half:] {
					s.wantBlob(key, noise(size, 1))
				}
				room := 0
				eventually(t, "room for half of what was deleted", func() bool {
					room += len(fill(t, s, size))
					return room >= half/2
				})
			})
		}
	}
}

// fill puts blobs until the disk is full and returns the keys that are stored.
func fill(t *testing.T, s *testServer, size int) (stored []string) {
	t.Helper()
	for i := 0; ; i++ {
		key := fmt.Sprintf("%d/%d", time.Now().UnixNano(), i)
		resp, body, err := s.do("PUT", blobPath(key), bytes.NewReader(noise(size, 1)))
		if err != nil {
			t.Fatal(err)
		}
		if resp.StatusCode == 507 {
			if string(body) != "disk full\n" {
				t.Errorf("%q", body)
			}
			break
		}
		if resp.StatusCode/100 != 2 || i > 100_000 {
			t.Fatalf("%s %s", resp.Status, body)
		}
		stored = append(stored, key)
	}
	// In async mode some that were accepted may have failed after all.
	return slices.DeleteFunc(stored, func(key string) bool {
		resp, _, err := s.do("HEAD", blobPath(key), nil)
		if err == nil && resp.StatusCode == 404 && !s.store.async {
			t.Errorf("%s was acknowledged and is gone", key)
		}
		return err != nil || resp.StatusCode != 200
	})
}

// ============================================================================
// Batcher
//
// On a fake clock, with a fake commit: exact sizes and times, no sleeping.
// ============================================================================

type fakeCommit struct {
	b       *batcher
	start   time.Time
	takes   time.Duration // of each commit
	batches []string      // "time:keys"
}

func (f *fakeCommit) commit(batch []*op) {
	var keys string
	for _, o := range batch {
		keys += o.key
	}
	f.batches = append(f.batches, fmt.Sprintf("%d:%s", time.Since(f.start).Milliseconds(), keys))
	time.Sleep(f.takes)
	for _, o := range batch {
		f.b.finish(o)
	}
}

func TestBatcher(t *testing.T) {
	ms := func(n int) time.Duration { return time.Duration(n) * time.Millisecond }
	type step struct {
		at  int // ms
		key string
		do  string // "", "urgent", "alone", "settle" or "big"
	}
	for _, c := range []struct {
		name   string
		size   int
		window time.Duration
		takes  time.Duration
		steps  []step
		want   string
	}{
		{"off", 1, 0, ms(5), []step{{0, "a", ""}, {1, "b", ""}, {1, "c", ""}}, "0:a 5:b 10:c"},
		{"what is queued", 4, 0, ms(5), []step{{0, "a", ""}, {1, "b", ""}, {2, "c", ""}}, "0:a 5:bc"},
		{"at most size", 2, 0, ms(5), []step{{0, "a", ""}, {1, "b", ""}, {1, "c", ""}, {1, "d", ""}}, "0:a 5:bc 10:d"},
		{"window from the first", 9, ms(10), 0, []step{{0, "a", ""}, {6, "b", ""}, {9, "c", ""}, {12, "d", ""}}, "10:abc 22:d"},
		{"a full batch does not wait", 2, ms(10), 0, []step{{0, "a", ""}, {3, "b", ""}, {4, "c", ""}}, "3:ab 14:c"},
		{"waited during a commit", 9, ms(10), ms(30), []step{{0, "a", ""}, {12, "b", ""}, {13, "c", ""}}, "10:a 40:bc"},
		{"urgent", 9, ms(10), 0, []step{{0, "a", ""}, {4, "b", "urgent"}, {5, "c", ""}}, "4:ab 15:c"},
		{"alone", 9, 0, ms(5), []step{{0, "a", ""}, {1, "b", ""}, {1, "c", "alone"}, {1, "d", ""}}, "0:a 5:b 10:c 15:d"},
		{"a reader hurries", 9, ms(10), 0, []step{{0, "a", ""}, {3, "a", "settle"}, {5, "b", ""}}, "3:a 15:b"},
		{"bytes", 9, 0, ms(5), []step{{0, "a", ""}, {1, "b", "big"}, {1, "c", "big"}, {1, "d", ""}}, "0:a 5:bc 10:d"},
		{"bytes end the window", 9, ms(10), 0, []step{{0, "a", "big"}, {3, "b", "big"}, {4, "c", ""}}, "3:ab 14:c"},
	} {
		synctest.Test(t, func(t *testing.T) {
			f := &fakeCommit{start: time.Now(), takes: c.takes}
			f.b = newBatcher(c.size, c.window, f.commit)
			go f.b.run()
			for _, s := range c.steps {
				time.Sleep(time.Until(f.start.Add(ms(s.at))))
				o := &op{key: s.key, background: true, urgent: s.do == "urgent"}
				switch s.do {
				case "alone":
					o.alone = func(*writer) error { return nil }
				case "big":
					o.data = make([]byte, batchBytes/2)
				case "settle":
					go f.b.settle(s.key)
					continue
				}
				if !f.b.add(o) {
					t.Fatal("closed")
				}
				synctest.Wait()
			}
			time.Sleep(ms(100))
			f.b.close()
			if got := strings.Join(f.batches, " "); got != c.want {
				t.Errorf("%s: %s, want %s", c.name, got, c.want)
			}
			if len(f.b.newest) != 0 || f.b.add(&op{}) {
				t.Errorf("%s: not empty, or open, after close", c.name)
			}
		})
	}
}

func TestBatcherDrainsAtClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fakeCommit{start: time.Now(), takes: time.Millisecond}
		f.b = newBatcher(2, time.Hour, f.commit)
		go f.b.run()
		for _, key := range []string{"a", "b", "c"} {
			f.b.add(&op{key: key})
		}
		f.b.close() // does not wait for the window
		if got := strings.Join(f.batches, " "); got != "0:ab 1:c" {
			t.Error(got)
		}
	})
}

func TestBudget(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		stop := make(chan struct{})
		b := newBudget(10, time.Second, stop)
		start := time.Now()
		var mu sync.Mutex
		got := map[string]string{}
		var wg sync.WaitGroup
		acquire := func(name string, n int64) {
			wg.Go(func() {
				err := b.acquire(b.clamp(n))
				mu.Lock()
				defer mu.Unlock()
				got[name] = fmt.Sprintf("%d:%v", time.Since(start).Milliseconds(), err)
			})
			synctest.Wait()
		}
		acquire("a", 6)
		acquire("b", 6)   // waits
		acquire("c", 1)   // would fit, but comes after b
		acquire("d", 999) // as large as there is
		time.Sleep(300 * time.Millisecond)
		b.release(6)
		time.Sleep(400 * time.Millisecond)
		b.release(7)
		acquire("e", 9) // loses patience
		time.Sleep(900 * time.Millisecond)
		acquire("f", 5)
		time.Sleep(300 * time.Millisecond)
		close(stop)
		wg.Wait()
		want := map[string]string{"a": "0:<nil>", "b": "300:<nil>", "c": "300:<nil>", "d": "700:<nil>", "e": "1700:too busy, try again", "f": "1900:server is stopping"}
		if !maps.Equal(got, want) {
			t.Errorf("%v, want %v", got, want)
		}
	})
}

// ============================================================================
// Cache
// ============================================================================

func TestCache(t *testing.T) {
	c := newCache(20_000)
	small := func(n int) *blob { return &blob{size: int64(n), data: make([]byte, n)} }
	place := c.reserve("k")
	if c.get("k") != nil || c.reserve("k") != nil {
		t.Error("a reserved place is taken for a blob, or reserved twice")
	}
	c.drop("k") // a commit between the reservation and the fill
	c.fill("k", place, small(1))
	if c.get("k") != nil {
		t.Error("the row of before the commit got in")
	}
	c.fill("k", c.reserve("k"), small(1))
	if c.get("k") == nil {
		t.Error("not kept")
	}
	c.fill("large", c.reserve("large"), small(cacheItem+1))
	c.fill("missing", c.reserve("missing"), nil)
	if len(c.entries) != 1 {
		t.Error("what is not to be kept left something behind")
	}
	for i := range 100 {
		key := fmt.Sprint(i)
		c.fill(key, c.reserve(key), small(1000))
		if c.bytes > c.limit || c.get(key) == nil {
			t.Fatalf("%d of %d bytes, or the newest is missing", c.bytes, c.limit)
		}
	}
	for key := range maps.Clone(c.entries) {
		c.drop(key)
	}
	if c.bytes != 0 {
		t.Errorf("%d bytes in an empty cache", c.bytes)
	}
}

// Readers never see an older version after a newer, nor miss an acknowledged
// write, with the cache in between.
func TestReadsAreMonotonic(t *testing.T) {
	s := newTestServer(t, func(c *config) { c.NumShards = 1 })
	s.put("k", []byte("0"))
	var acked atomic.Int64
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for newest := int64(0); ; {
				select {
				case <-stop:
					return
				default:
				}
				least := max(newest, acked.Load())
				_, body := s.want(200, "GET", "/blob/k", nil)
				if newest, _ = strconv.ParseInt(string(body), 10, 64); newest < least {
					t.Errorf("read %d after %d", newest, least)
					return
				}
			}
		})
	}
	for i := range int64(500) {
		s.put("k", strconv.AppendInt(nil, i, 10))
		acked.Store(i)
	}
	close(stop)
	wg.Wait()
	s.want(200, "GET", "/blob/k", nil)
	for i := range 10 {
		s.put(fmt.Sprint("unread", i), []byte("x"))
	}
	c := s.store.shards[0].cache
	c.mu.Lock() // upkeep passes here too
	defer c.mu.Unlock()
	if b := c.entries["k"]; b == nil || b.size < 0 || len(c.entries) != 1 {
		t.Errorf("the cache has %d entries after ten writes and one read", len(c.entries))
	}
}

// ============================================================================
// Maintenance
// ============================================================================

// runCommand runs one command line in this process; env is for its configuration.
func runCommand(t testing.TB, env []string, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	code = run(t.Context(), args, env, &out, &errs)
	return code, out.String(), errs.String()
}

// sampleDir is a stopped directory with every kind of blob: small and large, as
// it is and deflated.
func sampleDir(t testing.TB) *config {
	cfg := testConfig(t, func(c *config) { c.StorageCompression = true })
	s := serveConfig(t, cfg, stallTimeout)
	for key, body := range map[string][]byte{"empty": nil, "small": noise(5000, 1), "text": prose(5000, 2), "large": noise(3*chunkSize, 3), "prose": prose(3*chunkSize+5, 4)} {
		s.put(key, body)
	}
	for i := range 50 {
		s.put(fmt.Sprint("more/", i), prose(i*20, uint64(i)))
	}
	if err := s.stop(); err != nil {
		t.Fatal(err)
	}
	return cfg
}

// Each row damages one place, and check names it.
func TestCheck(t *testing.T) {
	t.Chdir(t.TempDir())
	sample := sampleDir(t)
	home := func(key string) int { return int(hashes["fnv1a"](key) % 4) }
	shard := func(dir, key string) string { return filepath.Join(dir, shardName(home(key))) }
	update := func(key, what string) func(*testing.T, string) {
		return func(t *testing.T, dir string) { exec1(t, shard(dir, key), what) }
	}
	flip := func(column string) string {
		return fmt.Sprintf("%s = CAST(substr(%[1]s, 1, 2000) || char((unicode(CAST(substr(%[1]s, 2001, 1) AS TEXT)) + 1) %% 128) || substr(%[1]s, 2002) AS BLOB)", column)
	}
	of := func(key string) string { return fmt.Sprintf("shard %d: key %q: ", home(key), key) }
	for _, c := range []struct {
		name   string
		damage func(t *testing.T, dir string)
		want   []string
	}{
		{"nothing", func(*testing.T, string) {}, nil},
		{"small content", update("small", "UPDATE blobs SET "+flip("data")+" WHERE key = 'small'"), []string{of("small") + "shard is corrupt"}},
		{"deflated content", update("text", "UPDATE blobs SET data = zeroblob(length(data)) WHERE key = 'text'"), []string{of("text")}},
		{"a chunk", update("large", "UPDATE chunks SET "+flip("data")+" WHERE id = (SELECT id << 20 | 1 FROM blobs WHERE key = 'large')"), []string{of("large") + "shard is corrupt"}},
		{"a deflated chunk", update("prose", "UPDATE chunks SET data = zeroblob(length(data)) WHERE id = (SELECT id << 20 | 3 FROM blobs WHERE key = 'prose')"), []string{of("prose")}},
		{"a chunk is missing", update("large", "DELETE FROM chunks WHERE id = (SELECT id << 20 | 2 FROM blobs WHERE key = 'large')"), []string{of("large"), "2 chunks"}},
		{"a chunk too many", update("large", "INSERT INTO chunks SELECT id << 20 | 3, x'00' FROM blobs WHERE key = 'large'"), []string{of("large"), "4 chunks"}},
		{"SHA-256", update("small", "UPDATE blobs SET sha256 = zeroblob(32) WHERE key = 'small'"), []string{of("small")}},
		{"half a SHA-256", update("small", "UPDATE blobs SET sha256 = zeroblob(16) WHERE key = 'small'"), []string{of("small"), "16 bytes"}},
		{"CRC-32", update("text", "UPDATE blobs SET crc32 = crc32 + 1 WHERE key = 'text'"), []string{of("text"), "CRC-32"}},
		{"size", update("small", "UPDATE blobs SET size = size - 1 WHERE key = 'small'"), []string{of("small")}},
		{"stored", update("prose", "UPDATE blobs SET stored = stored + 1 WHERE key = 'prose'"), []string{of("prose")}},
		{"codec", update("small", "UPDATE blobs SET codec = 9 WHERE key = 'small'"), []string{of("small"), "codec 9"}},
		{"an emptied blob", update("empty", "UPDATE blobs SET data = x'00', stored = 1 WHERE key = 'empty'"), []string{of("empty")}},
		{"placement", update("small", "UPDATE blobs SET key = 'smalls' WHERE key = 'small'"), []string{fmt.Sprintf("shard %d: key \"smalls\": it belongs to shard %d", home("small"), home("smalls"))}},
		{"a bad key", update("small", "UPDATE blobs SET key = CAST(x'ff' AS TEXT) WHERE key = 'small'"), []string{"not valid UTF-8"}},
		{"stray chunks", update("large", "INSERT INTO chunks VALUES (99 << 20, x'00')"), []string{fmt.Sprintf("shard %d: content 99 has chunks", home("large"))}},
		{"orphaned chunks", update("large", "INSERT INTO chunks VALUES (99 << 20, x'00'); INSERT INTO orphans VALUES (99)"), nil},
		{"totals", update("large", "UPDATE totals SET bytes = bytes + 1"), []string{fmt.Sprintf("shard %d: the totals", home("large"))}},
		{"an index", update("large", "DROP INDEX expiring"), []string{fmt.Sprintf("shard %d: the schema lacks", home("large")), "expiring"}},
		{"another tool's table", update("large", "CREATE TABLE _litestream_seq (id INTEGER)"), nil},
		{"a newer schema", update("large", "PRAGMA user_version = 7"), []string{"version 7", "newer"}},
		{"the header", update("large", "PRAGMA application_id = 1"), []string{"belongs to program 0x1"}},
		{"no version", update("large", "PRAGMA user_version = 0"), []string{"its schema is version 0, not 1"}},
		{"an unreadable row", update("small", "UPDATE blobs SET updated_at = 'x' WHERE key = 'small'; UPDATE blobs SET sha256 = zeroblob(32) WHERE key <> 'small'"),
			[]string{of("small"), "5"}},
		{"the record", update("large", "UPDATE meta SET value = 'another' WHERE key = 'directory'"), []string{"it says that it is shard"}},
		{"another count", update("large", "UPDATE meta SET value = 100000000000 WHERE key = 'num_shards'"), []string{"it says that it is shard"}},
		{"an id that is not ours", update("small", "UPDATE blobs SET id = -id, sha256 = zeroblob(32) WHERE key = 'small'"), []string{of("small")}},
		{"no record", update("large", "DELETE FROM meta"), []string{"meta is incomplete"}},
		{"a missing shard", func(t *testing.T, dir string) { os.Remove(shard(dir, "large")) }, []string{fmt.Sprintf("shard %d: the file is missing", home("large"))}},
		{"a shard too many", func(t *testing.T, dir string) { copyFile(t, shard(dir, "large"), filepath.Join(dir, shardName(7))) }, []string{"shard 7: the directory has only 4"}},
		{"no database", func(t *testing.T, dir string) { os.WriteFile(shard(dir, "large"), []byte("garbage"), 0o600) }, []string{fmt.Sprintf("shard %d: ", home("large")), "not a database"}},
		{"a torn page", func(t *testing.T, dir string) {
			f, err := os.OpenFile(shard(dir, "large"), os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			if _, err := f.WriteAt(noise(100, 1), 4096); err != nil {
				t.Fatal(err)
			}
		}, []string{fmt.Sprintf("shard %d: ", home("large"))}},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "data")
			if err := os.CopyFS(dir, os.DirFS(sample.DataDir)); err != nil {
				t.Fatal(err)
			}
			c.damage(t, dir)
			code, stdout, stderr := runCommand(t, nil, "check", dir)
			lines := strings.Split(strings.TrimSuffix(stdout, "\n"), "\n")
			if (code == 1) != (c.want != nil) || code == 1 != (strings.Count(stderr, "\n") == 1) || !strings.Contains(lines[len(lines)-1], "shards, ") {
				t.Errorf("code %d\n%s%s", code, stdout, stderr)
			}
			for _, want := range c.want {
				if !strings.Contains(stdout, want) {
					t.Errorf("%s, want %q", stdout, want)
				}
			}
			for _, line := range lines[:len(lines)-1] {
				if !strings.HasPrefix(line, "shard ") {
					t.Errorf("line %q", line)
				}
			}
		})
	}
	rust := t.TempDir()
	exec1(t, filepath.Join(rust, shardName(0)), "CREATE TABLE blobs (key TEXT PRIMARY KEY, data BLOB)")
	for args, want := range map[string]string{"check " + t.TempDir(): "holds no shards", "check " + rust: "run: blobnom migrate " + rust, "check missing": "cannot read", "check a b": "no argument"} {
		if code, stdout, stderr := runCommand(t, nil, strings.Fields(args)...); code == 0 || !strings.Contains(stderr, want) || stdout != "" {
			t.Errorf("%s: code %d, %s%s", args, code, stdout, stderr)
		}
	}
	if code, stdout, stderr := runCommand(t, []string{"BLOBNOM_DATA_DIR=" + sample.DataDir}, "check"); code != 0 || !strings.Contains(stdout, "4 shards, 55 blobs, ") {
		t.Errorf("of the configured directory: code %d, %s%s", code, stdout, stderr)
	}
}

// load writes, replaces and deletes until it is stopped.
func (s *testServer) load() (stop func()) {
	done := make(chan struct{})
	var group sync.WaitGroup
	for w := range 4 {
		group.Go(func() {
			rnd := rand.New(rand.NewPCG(uint64(w), 0))
			for i := 0; ; i++ {
				select {
				case <-done:
					return
				default:
				}
				key := fmt.Sprintf("load/%d/%d", w, rnd.IntN(20))
				if rnd.IntN(5) == 0 {
					s.want(204, "DELETE", "/blob/"+key, nil)
				} else {
					s.put(key, noise([]int{100, 20_000, 2 * chunkSize}[rnd.IntN(3)], rnd.Uint64()))
				}
			}
		})
	}
	return func() { close(done); group.Wait() }
}

func TestBackup(t *testing.T) {
	t.Chdir(t.TempDir())
	cfg := testConfig(t, func(c *config) { c.StorageCompression = true })
	s := serveConfig(t, cfg, stallTimeout)
	want := map[string][]byte{}
	for i, size := range []int{0, 100, 20_000, 3 * chunkSize, 10 * chunkSize} {
		want[fmt.Sprint("n", i)], want[fmt.Sprint("p", i)] = noise(size, 1), prose(size, 2)
	}
	for key, body := range want {
		s.put(key, body, "Content-Type", "a/b")
	}
	env := []string{"BLOBNOM_DATA_DIR=" + cfg.DataDir}
	to := filepath.Join(t.TempDir(), "copy #1 100%")
	stop := s.load()
	// Under load, a live directory is copied and checked.
	if code, stdout, stderr := runCommand(t, env, "backup", to); code != 0 || !strings.Contains(stdout, "copied and verified") {
		t.Fatalf("code %d, %s%s", code, stdout, stderr)
	}
	if code, stdout, _ := runCommand(t, env, "check"); code != 0 {
		t.Errorf("check of the live directory: code %d, %s", code, stdout)
	}
	if code, stdout, _ := runCommand(t, nil, "check", to); code != 0 {
		t.Errorf("check of the copy: code %d, %s", code, stdout)
	}
	if code, _, stderr := runCommand(t, env, "backup", to); code != 1 || !strings.Contains(stderr, "not empty") {
		t.Errorf("over a backup: code %d, %s", code, stderr)
	}
	if left, _ := filepath.Glob(filepath.Join(filepath.Dir(to), "*.partial")); len(left) > 0 {
		t.Error("left:", left)
	}
	os.Rename(to, to+".older")
	stop()
	// Restoring is copying it back.
	restored := *cfg
	restored.DataDir = to + ".older"
	r := serveConfig(t, &restored, stallTimeout)
	for key, body := range want {
		resp := r.wantBlob(key, body)
		if orig := s.wantBlob(key, body); orig.Header.Get("Blob-Created") != resp.Header.Get("Blob-Created") || resp.Header.Get("Content-Type") != "a/b" {
			t.Errorf("%q: %v", key, resp.Header)
		}
	}
	r.put("new", []byte("x"))
	if err := s.stop(); err != nil {
		t.Fatal(err)
	}
	// An empty directory is as good as none; something else in the way is not.
	if err := os.Mkdir(to, 0o755); err != nil {
		t.Fatal(err)
	}
	if code, stdout, stderr := runCommand(t, env, "backup", to); code != 0 {
		t.Errorf("into an empty directory: code %d, %s%s", code, stdout, stderr)
	}
	other := filepath.Join(t.TempDir(), "b")
	os.Mkdir(other+".partial", 0o755)
	os.WriteFile(filepath.Join(other+".partial", "diary.txt"), []byte("mine"), 0o600)
	for _, c := range []struct {
		args []string
		want string
	}{{[]string{other}, "in the way"}, {nil, "argument is missing"}, {[]string{to + "/shard_0.db"}, "cannot copy into"}, {[]string{to, to}, "no argument"}} {
		if code, stdout, stderr := runCommand(t, env, append([]string{"backup"}, c.args...)...); code == 0 || !strings.Contains(stderr, c.want) || stdout != "" {
			t.Errorf("backup %q: code %d, %s%s", c.args, code, stdout, stderr)
		}
	}
	if _, err := os.Stat(filepath.Join(other+".partial", "diary.txt")); err != nil {
		t.Error("what was not ours is gone")
	}
	// A link stays one; what is called .partial and is none stays, too.
	link, target := filepath.Join(t.TempDir(), "link"), filepath.Join(t.TempDir(), "target")
	if err := cmp.Or(os.Mkdir(target, 0o755), os.Symlink(target, link)); err != nil {
		t.Fatal(err)
	}
	if code, _, stderr := runCommand(t, env, "backup", link); code != 0 || !fileExists(filepath.Join(target, shardName(0))) {
		t.Errorf("into a link: code %d, %s", code, stderr)
	}
	nowhere, other2 := filepath.Join(t.TempDir(), "nowhere"), filepath.Join(t.TempDir(), "b")
	os.Symlink("missing", nowhere)
	os.Symlink(t.TempDir(), other2+".partial")
	if code, _, stderr := runCommand(t, env, "backup", other2); code != 1 || !strings.Contains(stderr, "in the way") {
		t.Errorf("with a link in the way: code %d, %s", code, stderr)
	}
	// A link that leads to nothing is what a killed run may leave of one to a directory.
	if code, _, stderr := runCommand(t, env, "backup", nowhere); code != 0 || !fileExists(filepath.Join(filepath.Dir(nowhere), "missing", shardName(0))) {
		t.Errorf("into a link: code %d, %s", code, stderr)
	}
	os.Symlink("loop", filepath.Join(filepath.Dir(nowhere), "loop"))
	if code, _, stderr := runCommand(t, env, "backup", filepath.Join(filepath.Dir(nowhere), "loop")); code != 1 || !strings.Contains(stderr, "cannot copy into") {
		t.Errorf("into a loop: code %d, %s", code, stderr)
	}
	// What was killed when it was complete but for its name is made anew.
	os.WriteFile(filepath.Join(target, partialFile), nil, 0o600)
	os.WriteFile(filepath.Join(target, lockFile), nil, 0o600)
	if code, stdout, stderr := runCommand(t, env, "backup", target); code != 0 || fileExists(filepath.Join(target, partialFile)) || fileExists(filepath.Join(target, lockFile)) {
		t.Errorf("again: code %d, %s%s", code, stdout, stderr)
	}
	whole := filepath.Join(t.TempDir(), "whole")
	if err := os.CopyFS(whole+".partial", os.DirFS(target)); err != nil {
		t.Fatal(err)
	}
	for _, from := range []string{cfg.DataDir, whole + ".partial"} {
		if code, _, stderr := runCommand(t, []string{"BLOBNOM_DATA_DIR=" + from}, "backup", whole); code != 1 || !strings.Contains(stderr, "in the way") || !fileExists(filepath.Join(whole+".partial", shardName(0))) {
			t.Errorf("over a whole directory called .partial: code %d, %s", code, stderr)
		}
	}
	os.WriteFile(filepath.Join(whole+".partial", partialFile), nil, 0o600)
	if code, _, stderr := runCommand(t, []string{"BLOBNOM_DATA_DIR=" + whole + ".partial"}, "backup", whole+"2"); code != 1 || !strings.Contains(stderr, "interrupted") {
		t.Errorf("of what is unfinished: code %d, %s", code, stderr)
	}
	if code, _, stderr := runCommand(t, []string{"BLOBNOM_DATA_DIR=" + whole + "2"}, "migrate", whole+".partial"); code != 1 || !strings.Contains(stderr, "interrupted") {
		t.Errorf("migrate of what is unfinished: code %d, %s", code, stderr)
	}
	// Damage is not backed up as if it were none.
	key := "n3"
	exec1(t, filepath.Join(cfg.DataDir, shardName(int(hashes["fnv1a"](key)%4))), "UPDATE blobs SET sha256 = zeroblob(32) WHERE key = 'n3'")
	bad := filepath.Join(t.TempDir(), "bad")
	if code, stdout, _ := runCommand(t, env, "backup", bad); code != 1 || !strings.Contains(stdout, `key "n3"`) || fileExists(bad) || fileExists(bad+".partial") {
		t.Errorf("of a damaged directory: code %d, %s", code, stdout)
	}
	exec1(t, filepath.Join(cfg.DataDir, shardName(int(hashes["fnv1a"](key)%4))), fmt.Sprintf("UPDATE blobs SET sha256 = x'%x' WHERE key = 'n3'", sha256.Sum256(want[key])))
}

// megabytes makes a directory with n blobs of one MiB.
func megabytes(t *testing.T, shards int64, n int) *config {
	t.Helper()
	cfg := testConfig(t, func(c *config) { c.NumShards = shards })
	s := serveConfig(t, cfg, stallTimeout)
	for i := range n {
		s.put(fmt.Sprint("k", i), noise(1<<20, uint64(i)))
	}
	if err := s.stop(); err != nil {
		t.Fatal(err)
	}
	return cfg
}

// A backup or a migration that is killed leaves nothing that passes for whole,
// and the next run completes.
func TestCopyKilled(t *testing.T) {
	cfg := megabytes(t, 2, 24)
	to := filepath.Join(t.TempDir(), "copy")
	for _, args := range [][]string{{"BLOBNOM_DATA_DIR=" + cfg.DataDir, "backup", to}, {"BLOBNOM_DATA_DIR=" + to, "migrate", cfg.DataDir}} {
		start := func() *exec.Cmd {
			cmd := exec.Command(os.Args[0], args[1:]...)
			cmd.Dir = t.TempDir()
			cmd.Env = append(os.Environ(), asProgram+"=1", args[0], "BLOBNOM_NUM_SHARDS=3")
			return cmd
		}
		for _, far := range []string{partialFile, shardName(0), shardName(1), shardName(1)} {
			if testing.Short() && far == shardName(0) {
				continue
			}
			cmd := start()
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			eventually(t, "the copy begins", func() bool { return fileExists(filepath.Join(to+".partial", far)) })
			cmd.Process.Kill()
			cmd.Wait()
			if fileExists(to) {
				t.Fatal("it was done before it was killed")
			}
			if code, stdout, stderr := runCommand(t, nil, "check", to+".partial"); code != 1 || !strings.Contains(stderr, "interrupted") {
				t.Errorf("check takes half a copy for a whole one: %s%s", stdout, stderr)
			}
			if code, _, stderr := runCommand(t, []string{"BLOBNOM_DATA_DIR=" + to + ".partial", "BLOBNOM_NUM_SHARDS=2", "BLOBNOM_ADDR=127.0.0.1:0"}, "serve"); code != 1 || !strings.Contains(stderr, "interrupted") {
				t.Errorf("serve takes half a copy for a whole one: %d %s", code, stderr)
			}
		}
		if out, err := start().CombinedOutput(); err != nil || !strings.Contains(string(out), "24 blobs") {
			t.Errorf("%v: %s", err, out)
		}
		verifyDir(t, to)
		os.RemoveAll(to)
	}
}

// Where a copy finds no room it fails, and takes nothing.
func TestCopyDiskFull(t *testing.T) {
	t.Chdir(t.TempDir())
	cfg := megabytes(t, 1, 20)
	small := mount(t, "16m")
	to := filepath.Join(small, "copy")
	for _, args := range [][]string{{"BLOBNOM_DATA_DIR=" + cfg.DataDir, "backup", to}, {"BLOBNOM_DATA_DIR=" + to, "migrate", cfg.DataDir}} {
		code, stdout, stderr := runCommand(t, args[:1], args[1:]...)
		if left, _ := os.ReadDir(small); code != 1 || !strings.Contains(stderr, "full") || len(left) > 0 {
			t.Errorf("code %d, %s%s; left: %v", code, stdout, stderr, left)
		}
	}
}

// While a copy is made nobody may read it who may not read its place, and where it
// cannot be taken away its marker stays.
func TestCopyInTheMaking(t *testing.T) {
	to := filepath.Join(t.TempDir(), "to")
	if err := os.Mkdir(to, 0o700); err != nil {
		t.Fatal(err)
	}
	busy := filepath.Join(to+".partial", "busy")
	c := &call{stdout: io.Discard}
	err := c.copyInto(t.Context(), to, &checker{}, func(partial string, _ *sql.DB) error {
		if info, err := os.Stat(partial); err != nil || info.Mode().Perm() != 0o700 {
			t.Error(info.Mode(), err)
		}
		os.WriteFile(filepath.Join(partial, "a"), nil, 0o600)
		os.Mkdir(busy, 0o700)
		if out, err := exec.Command("mount", "-t", "tmpfs", "tmpfs", busy).CombinedOutput(); err != nil {
			t.Skipf("cannot mount: %v %s", err, out)
		}
		return errors.New("broken off")
	})
	if umount := exec.Command("umount", "-l", busy).Run(); umount != nil {
		t.Error(umount)
	}
	if err == nil || unfinished(to+".partial") == nil || fileExists(filepath.Join(to+".partial", "a")) {
		t.Error(err)
	}
}

// Whoever locks a copy once it is whole has the lock that others meet.
func TestCopyHandsOverLock(t *testing.T) {
	for range 10 {
		to := filepath.Join(t.TempDir(), "to")
		if err := os.Mkdir(to, 0o755); err != nil {
			t.Fatal(err)
		}
		locked := make(chan *sql.DB)
		c := &call{stdout: io.Discard}
		err := c.copyInto(t.Context(), to, &checker{}, func(partial string, lock *sql.DB) error {
			go func() {
				for fileExists(partial) || unfinished(to) != nil {
				}
				lock, err := lockDir(to)
				if err != nil {
					t.Error(err)
				}
				locked <- lock
			}()
			st, err := openLocked(partial, lock, testConfig(t), slog.New(slog.DiscardHandler), time.Now)
			return cmp.Or(err, st.closeDatabases())
		})
		first := <-locked
		if second, serr := lockDir(to); err != nil || !errors.Is(serr, errInUse) {
			t.Fatal("two have the lock", second, serr, err)
		}
		first.Close()
	}
}

// A copy that has less than was copied gets no name.
func TestCopyTooLittle(t *testing.T) {
	cfg := testConfig(t)
	to := filepath.Join(t.TempDir(), "to")
	c := &call{stdout: io.Discard}
	for _, want := range []*progress{{blobs: 1}, {bytes: 1}, {}} {
		err := c.copyInto(t.Context(), to, &checker{want: want}, func(partial string, lock *sql.DB) error {
			st, err := openLocked(partial, lock, cfg, slog.New(slog.DiscardHandler), time.Now)
			return cmp.Or(err, st.closeDatabases())
		})
		if (err == nil) != (*want == progress{}) || fileExists(to) != (err == nil) || fileExists(to+".partial") {
			t.Errorf("%+v: %v", want, err)
		}
	}
}

// foreign makes shards as another program left them that never closed them:
// rows in the databases, rows in the WALs. sql gives the statements for a shard.
func foreign(t *testing.T, shards int, sql func(shard int, exec func(query string, args ...any))) string {
	t.Helper()
	made, dir := t.TempDir(), filepath.Join(t.TempDir(), "foreign dir")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for i := range shards {
		db := openDB(filepath.Join(made, shardName(i)), "_pragma=journal_mode(wal)&_pragma=wal_autocheckpoint(200)")
		defer db.Close()
		db.SetMaxOpenConns(1)
		sql(i, func(query string, args ...any) {
			if _, err := db.Exec(query, args...); err != nil {
				t.Fatalf("%s: %v", query, err)
			}
		})
		copyFile(t, filepath.Join(made, shardName(i)), filepath.Join(dir, shardName(i)))
		copyFile(t, filepath.Join(made, shardName(i)+"-wal"), filepath.Join(dir, shardName(i)+"-wal"))
		if i%2 == 0 {
			copyFile(t, filepath.Join(made, shardName(i)+"-shm"), filepath.Join(dir, shardName(i)+"-shm"))
		}
	}
	return dir
}

func oddKey(i int) string {
	return fmt.Sprintf([]string{"plain/%d", "a b/%d", "ü/日本/%d", "'\";-- %d", "100%%/%d?#", "//%d/../x", "\x01\x7f%d", "%d"}[i%8], i)
}

func oddBody(i int) []byte {
	switch {
	case i%100 == 7:
		return nil
	case i%1000 == 9:
		return prose(300_000+i, uint64(i))
	}
	return prose(i%3000, uint64(i))
}

// contents fetches everything a directory holds.
func contents(t *testing.T, dir string) map[string][]byte {
	t.Helper()
	found := map[string][]byte{}
	files, _ := filepath.Glob(filepath.Join(dir, "shard_*.db"))
	for i := range files {
		s := &shard{store: &store{dir: dir, now: time.Now}, index: i}
		if err := s.openReaders(filepath.Join(dir, shardName(i)), ""); err != nil {
			t.Fatal(err)
		}
		row, err := s.readers.Prepare("SELECT key, " + blobColumns + ", data FROM blobs WHERE id > ? ORDER BY id LIMIT 1")
		if err != nil {
			t.Fatal(err)
		}
		for id := int64(0); ; {
			key, b, err := nextBlob(row, id)
			if err != nil {
				t.Fatal(err)
			}
			if b == nil {
				break
			}
			id = b.id
			if found[key], err = io.ReadAll((&content{shard: s, blob: b}).reader()); err != nil {
				t.Fatal(err)
			}
		}
		s.close()
	}
	return found
}

func TestMigrateForeign(t *testing.T) {
	const shards = 3
	keys := 10_000
	if testing.Short() {
		keys = 1000
	}
	future := time.Now().Unix() + 1000
	home := func(key string) int { return int(hashes["fnv1a"](key) % shards) }
	zip := func(b []byte) []byte {
		var out bytes.Buffer
		w := gzip.NewWriter(&out)
		w.Write(b)
		w.Close()
		return out.Bytes()
	}
	plain := func(i int, exec func(string, ...any)) {
		exec("CREATE TABLE blobs (key TEXT PRIMARY KEY, data BLOB)")
		exec("BEGIN")
		for k := range keys {
			if key := oddKey(k); home(key) == i {
				if body := oddBody(k); body == nil {
					exec("INSERT INTO blobs VALUES (?, NULL)", key)
				} else {
					exec("INSERT INTO blobs VALUES (?, ?)", key, body)
				}
			}
			if k%2000 == 0 {
				exec("COMMIT")
				exec("BEGIN")
			}
		}
		exec("COMMIT")
	}
	largeSizes := []int{chunkSize - 1, chunkSize, chunkSize + 1, 300_000, 1 << 20, 3_000_001, 65536*5 - 20, 65536*5 + 20, 4092 * 100, 508*1000 + 7, 65532 * 6, 262_500}
	const metadata = "(key TEXT PRIMARY KEY, %s BLOB, created_at INTEGER NOT NULL, updated_at INTEGER NOT NULL, expires_at INTEGER, version INTEGER NOT NULL DEFAULT 0)"
	all := map[string][]byte{}
	for k := range keys {
		all[oddKey(k)] = oddBody(k)
	}
	for _, c := range []struct {
		name string
		make func(i int, exec func(string, ...any))
		args string
		want map[string][]byte // nil: it fails
		says []string
	}{
		{"blobnom", plain, "", all, []string{fmt.Sprint(keys, " blobs")}},
		{"metadata", func(i int, exec func(string, ...any)) {
			exec("CREATE TABLE blobs " + fmt.Sprintf(metadata, "data"))
			if i == home("k") {
				exec("INSERT INTO blobs VALUES ('k', 'text', 1000, 2000, ?, 7)", future)
			}
			exec("INSERT INTO blobs VALUES (?, 'old', 1000, 2000, 3000, 7)", fmt.Sprint("expired", i))
			exec("INSERT INTO blobs VALUES (?, 'x', ?2, ?2, ?2, 7)", fmt.Sprint("for ever", i), int64(1<<63-1))
			if i == 0 {
				exec("INSERT INTO blobs VALUES ('often', 'x', 1, 2, NULL, ?)", int64(1<<63-1))
			}
			exec("INSERT INTO blobs VALUES (?, 'x', 0, 0, ?, 8)", fmt.Sprint("since ever", i), []any{nil, 0, -5}[i])
		}, "", map[string][]byte{"k": []byte("text"), "for ever0": []byte("x"), "for ever1": []byte("x"), "for ever2": []byte("x"), "since ever0": []byte("x"), "often": []byte("x")}, []string{"5 expired"}},
		{"generated columns", func(i int, exec func(string, ...any)) {
			exec("CREATE TABLE blobs (key TEXT PRIMARY KEY, a INT AS (length(key)) VIRTUAL, n INT AS (length(key)) STORED, data BLOB)")
			exec("INSERT INTO blobs (key, data) VALUES (?, ?)", fmt.Sprint("k", i), noise(300_000, 1))
		}, "", map[string][]byte{"k0": noise(300_000, 1), "k1": noise(300_000, 1), "k2": noise(300_000, 1)}, []string{"3 blobs"}},
		{"UTF-16", func(i int, exec func(string, ...any)) {
			exec("PRAGMA encoding = 'UTF-16le'")
			exec("CREATE TABLE blobs (key TEXT PRIMARY KEY, data BLOB)")
		}, "", nil, []string{"UTF-16le"}},
		{"blobasaur", func(i int, exec func(string, ...any)) {
			for _, table := range []string{"blobs", "Blobs_photos", `"blobs_with space"`} {
				exec("CREATE TABLE " + table + fmt.Sprintf(metadata, "value"))
				exec("INSERT INTO "+table+" VALUES (?, ?, 1, 2, NULL, 0)", fmt.Sprint("k", i), []byte(table+fmt.Sprint(i)))
			}
		}, "", map[string][]byte{
			"k0": []byte("blobs0"), "k1": []byte("blobs1"), "k2": []byte("blobs2"),
			"photos/k0": []byte("Blobs_photos0"), "photos/k1": []byte("Blobs_photos1"), "photos/k2": []byte("Blobs_photos2"),
			"with space/k0": []byte(`"blobs_with space"0`), "with space/k1": []byte(`"blobs_with space"1`), "with space/k2": []byte(`"blobs_with space"2`),
		}, []string{"9 blobs"}},
		{"gzip", func(i int, exec func(string, ...any)) {
			exec("CREATE TABLE blobs " + fmt.Sprintf(metadata, "data"))
			exec("CREATE TABLE blobs_n " + fmt.Sprintf(metadata, "data"))
			exec("INSERT INTO blobs VALUES (?, ?, 1, 2, NULL, 0), (?, NULL, 1, 2, NULL, 0)", fmt.Sprint("k", i), zip(prose(i*chunkSize, 1)), fmt.Sprint("null", i))
		}, "-codec gzip", map[string][]byte{"k0": {}, "k1": prose(chunkSize, 1), "k2": prose(2*chunkSize, 1), "null0": {}, "null1": {}, "null2": {}}, []string{"unpacked 3"}},
		{"not gzip", func(i int, exec func(string, ...any)) {
			exec("CREATE TABLE blobs_n " + fmt.Sprintf(metadata, "data"))
			exec("CREATE TABLE blobs " + fmt.Sprintf(metadata, "data"))
			exec("INSERT INTO blobs VALUES (?, ?, 1, 2, NULL, 0)", fmt.Sprint("k", i), slices.Concat(zip(prose(100, 1))[i:]))
		}, "-codec gzip", nil, []string{`key "k`, "is not gzip"}},
		{"gunzip", func(i int, exec func(string, ...any)) {
			exec("CREATE TABLE blobs (key TEXT PRIMARY KEY, data BLOB)")
			for key, body := range map[string][]byte{"zipped": zip(prose(3*chunkSize, 1)), "raw": prose(100, 1), "torn": zip(prose(1000, 1))[:60], "tail": append(zip(prose(100, 1)), "tail"...)} {
				if home(key) == i {
					exec("INSERT INTO blobs VALUES (?, ?)", key, body)
				}
			}
		}, "-gunzip", map[string][]byte{"zipped": prose(3*chunkSize, 1), "raw": prose(100, 1), "torn": zip(prose(1000, 1))[:60], "tail": append(zip(prose(100, 1)), "tail"...)}, []string{"unpacked 1, kept 3"}},
		{"misplaced", func(i int, exec func(string, ...any)) {
			exec("CREATE TABLE blobs (key TEXT PRIMARY KEY, data BLOB)")
			exec("INSERT INTO blobs VALUES (?, 'lost')", fmt.Sprint("lost", i))
			exec("INSERT INTO blobs VALUES ('twice', ?)", fmt.Sprint("in ", i == home("twice")))
		}, "", map[string][]byte{"lost0": []byte("lost"), "lost1": []byte("lost"), "lost2": []byte("lost"), "twice": []byte("in true")}, []string{`key "twice": in shard`, "2 found twice"}},
		{"expired at home", func(i int, exec func(string, ...any)) {
			exec("CREATE TABLE blobs " + fmt.Sprintf(metadata, "data"))
			if i == home("twice") {
				exec("INSERT INTO blobs VALUES ('twice', 'x', 1, 2, 3, 0)")
			} else {
				exec("INSERT INTO blobs VALUES ('twice', 'stale', 1, 2, NULL, 0)")
			}
		}, "", map[string][]byte{}, []string{`key "twice": in shard`, "1 expired", "2 found twice"}},
		{"one key, two types", func(i int, exec func(string, ...any)) {
			exec("CREATE TABLE blobs (key TEXT PRIMARY KEY, data BLOB)")
			if i == home("same") {
				exec("INSERT INTO blobs VALUES ('same', 'x'), (CAST('same' AS BLOB), 'y')")
			}
		}, "", nil, []string{`key "same"`, "nothing says which"}},
		{"gzip twice", func(i int, exec func(string, ...any)) {
			exec("CREATE TABLE blobs " + fmt.Sprintf(metadata, "data"))
			exec("INSERT INTO blobs VALUES ('twice', ?, 1, 2, NULL, 0)", zip([]byte("x")))
		}, "-codec gzip", nil, []string{`key "twice"`, "nothing says which"}},
		{"undecided", func(i int, exec func(string, ...any)) {
			exec("CREATE TABLE blobs (key TEXT PRIMARY KEY, data BLOB)")
			if i != home("twice") {
				exec("INSERT INTO blobs VALUES ('twice', ?)", i)
			}
		}, "", nil, []string{`key "twice"`, "nothing says which"}},
		{"undecided by a ring", func(i int, exec func(string, ...any)) {
			exec("CREATE TABLE blobs " + fmt.Sprintf(metadata, "value"))
			exec("INSERT INTO blobs VALUES ('twice', 'x', 1, 2, NULL, 0)")
		}, "", nil, []string{`key "twice"`, "nothing says which"}},
		{"a namespaced key collides", func(i int, exec func(string, ...any)) {
			exec("CREATE TABLE blobs " + fmt.Sprintf(metadata, "data"))
			exec("CREATE TABLE blobs_a " + fmt.Sprintf(metadata, "data"))
			if i == 0 {
				exec("INSERT INTO blobs VALUES ('a/b', 'x', 1, 2, NULL, 0)")
				exec("INSERT INTO blobs_a VALUES ('b', 'x', 1, 2, NULL, 0)")
			}
		}, "", nil, []string{`key "a/b"`, "nothing says which"}},
		{"invalid keys", func(i int, exec func(string, ...any)) {
			exec("CREATE TABLE blobs (key TEXT PRIMARY KEY, data BLOB)")
			exec("INSERT INTO blobs VALUES ('', 'x'), (?, 'x'), (CAST(x'ff' AS TEXT), 'x')", strings.Repeat("k", maxKeyBytes+1))
		}, "", nil, []string{"the key is empty", "1025 bytes", "not valid UTF-8", "9 keys cannot be taken over"}},
		{"invalid keys left out", func(i int, exec func(string, ...any)) {
			exec("CREATE TABLE blobs (key TEXT PRIMARY KEY, data BLOB)")
			exec("INSERT INTO blobs VALUES ('', 'x'), (?, 'y')", fmt.Sprint(i))
		}, "-skip-invalid", map[string][]byte{"0": []byte("y"), "1": []byte("y"), "2": []byte("y")}, []string{"3 with invalid keys"}},
		{"large rows", func(i int, exec func(string, ...any)) {
			exec("PRAGMA journal_mode = delete") // else the page size stays
			exec(fmt.Sprintf("PRAGMA page_size = %d", []int{512, 4096, 65536}[i]))
			exec("VACUUM")
			exec("PRAGMA journal_mode = wal")
			exec("CREATE TABLE blobs (key TEXT PRIMARY KEY, made REAL, data BLOB, more TEXT)")
			for k := range 400 {
				exec("INSERT INTO blobs VALUES (?, 1.5, ?, 'more')", fmt.Sprintf("filler/%d/%d", i, k), noise(k, 1))
			}
			for _, size := range largeSizes {
				exec("INSERT INTO blobs VALUES (?, ?, ?, ?)", fmt.Sprintf("large/%d/%d", i, size), size, noise(size, uint64(i)), strings.Repeat("m", size%5000))
				exec("INSERT INTO blobs VALUES (?, NULL, ?, NULL)", fmt.Sprintf("text/%d/%d", i, size), string(prose(size, uint64(i))))
			}
			exec("DELETE FROM blobs WHERE key LIKE 'filler/%3'")
		}, "", nil, []string{"1152 blobs"}},
		{"another program's", func(i int, exec func(string, ...any)) { exec("CREATE TABLE songs (title)") }, "", nil, []string{"no table of blobs"}},
		{"another codec", plain, "-codec zstd", nil, []string{"-codec zstd: only gzip"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Chdir(t.TempDir())
			from, to := foreign(t, shards, c.make), filepath.Join(t.TempDir(), "new", "data")
			before := snapshot(t, from)
			env := []string{"BLOBNOM_DATA_DIR=" + to, "BLOBNOM_NUM_SHARDS=4", "BLOBNOM_STORAGE_COMPRESSION=true"}
			code, stdout, stderr := runCommand(t, env, slices.Concat([]string{"migrate"}, strings.Fields(c.args), []string{from})...)
			for _, want := range c.says {
				if !strings.Contains(stdout+stderr, want) {
					t.Errorf("%s%s, want %q", stdout, stderr, want)
				}
			}
			for name, sum := range snapshot(t, from) {
				if before[name] != sum && !strings.HasSuffix(name, "-shm") {
					t.Errorf("%s has changed", name)
				}
				delete(before, name)
			}
			if len(before) > 0 {
				t.Errorf("gone: %v", before)
			}
			if c.name == "large rows" {
				c.want = map[string][]byte{}
				for i := range shards {
					for k := range 400 {
						if k%10 != 3 {
							c.want[fmt.Sprintf("filler/%d/%d", i, k)] = noise(k, 1)
						}
					}
					for _, size := range largeSizes {
						c.want[fmt.Sprintf("large/%d/%d", i, size)], c.want[fmt.Sprintf("text/%d/%d", i, size)] = noise(size, uint64(i)), prose(size, uint64(i))
					}
				}
			}
			if c.want == nil {
				if code == 0 || fileExists(to) || fileExists(to+".partial") {
					t.Errorf("code %d, %s%s", code, stdout, stderr)
				}
				return
			}
			if code != 0 {
				t.Fatalf("code %d, %s%s", code, stdout, stderr)
			}
			verifyDir(t, to)
			got := contents(t, to)
			for key, body := range c.want {
				if found, there := got[key]; !there || !bytes.Equal(found, body) {
					t.Errorf("%q: %d bytes, want %d", key, len(found), len(body))
				}
			}
			if len(got) != len(c.want) {
				t.Errorf("%d blobs, want %d", len(got), len(c.want))
			}
			if c.name == "metadata" {
				s := serveConfig(t, testConfig(t, func(c *config) { c.DataDir = to }), stallTimeout)
				h := s.wantBlob("k", []byte("text")).Header
				for name, want := range map[string]string{"Blob-Version": "7", "Blob-Created": stamp(1_000_000), "Blob-Updated": stamp(2_000_000), "Blob-Expires": stamp(future * 1000)} {
					if h.Get(name) != want {
						t.Errorf("%s %s, want %s", name, h.Get(name), want)
					}
				}
				s.put("often", []byte("y"))
				s.wantBlob("often", []byte("y"))
				if h := s.wantBlob("since ever0", []byte("x")).Header; h.Get("Blob-Version") != "8" || h.Get("Blob-Created") != stamp(0) {
					t.Error(h)
				}
			}
		})
	}
}

// What lies on a full disk can be read, checked and copied to another one.
func TestSourceOnFullDisk(t *testing.T) {
	t.Chdir(t.TempDir())
	full := mount(t, "8m")
	rust, ours := filepath.Join(full, "rust"), filepath.Join(full, "ours")
	from := foreign(t, 2, func(i int, exec func(string, ...any)) {
		exec("CREATE TABLE blobs (key TEXT PRIMARY KEY, data BLOB)")
		exec("INSERT INTO blobs VALUES (?, 'x')", fmt.Sprint("k", i))
	})
	if err := cmp.Or(os.CopyFS(rust, os.DirFS(from)), os.CopyFS(ours, os.DirFS(sampleDir(t).DataDir)), os.Remove(filepath.Join(rust, shardName(0)+"-shm"))); err != nil {
		t.Fatal(err)
	}
	filler, err := os.Create(filepath.Join(full, "filler"))
	if err != nil {
		t.Fatal(err)
	}
	for size := 1 << 20; size > 0; size /= 2 {
		for err = nil; err == nil; {
			_, err = filler.Write(make([]byte, size))
		}
	}
	filler.Close()
	for _, args := range [][]string{{"check", ours}, {"BLOBNOM_DATA_DIR=" + ours, "backup", filepath.Join(t.TempDir(), "b")}, {"BLOBNOM_DATA_DIR=" + filepath.Join(t.TempDir(), "m"), "migrate", rust}} {
		env := args[:len(args)-2]
		if code, stdout, stderr := runCommand(t, env, args[len(env):]...); code != 0 {
			t.Errorf("%s: code %d, %s%s", args, code, stdout, stderr)
		}
	}
}

// A shard that somebody locks is not a damaged one.
func TestCheckOfLocked(t *testing.T) {
	t.Parallel() // it mostly waits
	s := newTestServer(t, func(c *config) { c.NumShards = 1 })
	s.put("k", []byte("v"))
	if err := s.stop(); err != nil {
		t.Fatal(err)
	}
	db := openDB(filepath.Join(s.store.dir, shardName(0)), "_pragma=locking_mode(exclusive)")
	defer db.Close()
	db.SetMaxOpenConns(1)
	if _, err := db.Exec("BEGIN EXCLUSIVE; UPDATE totals SET blobs = blobs"); err != nil {
		t.Fatal(err)
	}
	if code, stdout, stderr := runCommand(t, nil, "check", s.store.dir); code != 1 || !strings.Contains(stderr, "cannot check shard 0: too busy") || stdout != "" {
		t.Errorf("code %d, %s%s", code, stdout, stderr)
	}
}

// A backup knows what is not ours, and leaves nothing in a backup that it copies.
func TestBackupSources(t *testing.T) {
	t.Chdir(t.TempDir())
	rust := foreign(t, 1, func(_ int, exec func(string, ...any)) { exec("CREATE TABLE blobs (key TEXT PRIMARY KEY, data BLOB)") })
	ours := filepath.Join(t.TempDir(), "b")
	if code, _, stderr := runCommand(t, []string{"BLOBNOM_DATA_DIR=" + sampleDir(t).DataDir}, "backup", ours); code != 0 {
		t.Fatal(stderr)
	}
	for from, want := range map[string]string{rust: "run: blobnom migrate " + rust, ours: "", t.TempDir(): "shard_0.db: the file is missing"} {
		before := snapshot(t, from)
		code, stdout, stderr := runCommand(t, []string{"BLOBNOM_DATA_DIR=" + from}, "backup", filepath.Join(t.TempDir(), "b"))
		if (code == 0) != (want == "") || !strings.Contains(stderr, want) {
			t.Errorf("code %d, %s%s", code, stdout, stderr)
		}
		if after := snapshot(t, from); !maps.Equal(before, after) {
			t.Errorf("%v became %v", before, after)
		}
	}
}

// A source may be made of links, and lie where nothing can be written.
func TestMigrateFromOddPlaces(t *testing.T) {
	t.Chdir(t.TempDir())
	from := foreign(t, 2, func(i int, exec func(string, ...any)) {
		exec("CREATE TABLE blobs (key TEXT PRIMARY KEY, data BLOB)")
		exec("INSERT INTO blobs VALUES (?, 'x')", fmt.Sprint("k", i))
	})
	links, sealed := t.TempDir(), mount(t, "16m")
	for i := range 2 {
		if err := os.Symlink(filepath.Join(from, shardName(i)), filepath.Join(links, shardName(i))); err != nil {
			t.Fatal(err)
		}
		copyFile(t, filepath.Join(from, shardName(i)), filepath.Join(sealed, shardName(i)))
		copyFile(t, filepath.Join(from, shardName(i)+"-wal"), filepath.Join(sealed, shardName(i)+"-wal"))
	}
	seal := func() {
		if out, err := exec.Command("mount", "-o", "remount,ro", sealed).CombinedOutput(); err != nil {
			t.Skipf("cannot mount: %v %s", err, out)
		}
	}
	seal()
	for _, from := range []string{links, sealed} {
		to := filepath.Join(t.TempDir(), "to")
		if code, stdout, stderr := runCommand(t, []string{"BLOBNOM_DATA_DIR=" + to}, "migrate", from); code != 0 || !strings.Contains(stdout, " 2 blobs") {
			t.Errorf("code %d, %s%s", code, stdout, stderr)
		}
	}
	// So may a directory of ours that is checked, with and without WALs.
	cfg := testConfig(t)
	s := serveConfig(t, cfg, stallTimeout)
	s.put("k", []byte("v"))
	for _, name := range []string{"live", "stopped"} {
		if name == "stopped" {
			s.stop()
		}
		exec.Command("mount", "-o", "remount,rw", sealed).Run()
		dir := filepath.Join(sealed, name)
		if err := os.CopyFS(dir, os.DirFS(cfg.DataDir)); err != nil {
			t.Fatal(err)
		}
		shms, _ := filepath.Glob(filepath.Join(dir, "*-shm"))
		for _, shm := range shms {
			os.Remove(shm)
		}
		os.Remove(filepath.Join(dir, reserveFile))
		seal()
		for _, args := range [][]string{{"check", dir}, {"BLOBNOM_DATA_DIR=" + dir, "backup", filepath.Join(t.TempDir(), "b")}, {"BLOBNOM_DATA_DIR=" + filepath.Join(t.TempDir(), "m"), "migrate", dir}} {
			env := args[:len(args)-2]
			if code, stdout, stderr := runCommand(t, env, args[len(env):]...); code != 0 || !strings.Contains(stdout, " 1 blobs") {
				t.Errorf("%s %s: code %d, %s%s", args, name, code, stdout, stderr)
			}
		}
		// A lock that cannot be written is none: SQLite gives it to everybody.
		if lock, err := lockDir(dir); !errors.Is(err, errAccess) {
			t.Error(err)
			lock.Close()
		}
	}
}

// An empty database is not opened: that would delete the WAL beside it.
func TestEmptyDatabase(t *testing.T) {
	t.Chdir(t.TempDir())
	for _, args := range [][]string{{"check"}, {"migrate"}, {"backup", "to"}} {
		from := foreign(t, 1, func(_ int, exec func(string, ...any)) { exec("CREATE TABLE blobs (key TEXT PRIMARY KEY, data BLOB)") })
		os.WriteFile(filepath.Join(from, lockFile), nil, 0o600)
		os.Truncate(filepath.Join(from, shardName(0)), 0)
		before := snapshot(t, from)
		dir := from
		if args[0] == "migrate" {
			args, dir = append(args, from), filepath.Join(t.TempDir(), "to")
		}
		if code, stdout, stderr := runCommand(t, []string{"BLOBNOM_DATA_DIR=" + dir}, args...); code != 1 || !strings.Contains(stdout+stderr, "missing or empty") {
			t.Errorf("%s: code %d, %s%s", args[0], code, stdout, stderr)
		}
		if after := snapshot(t, from); !maps.Equal(before, after) {
			t.Errorf("%s changed %v to %v", args[0], before, after)
		}
	}
}

// What cannot be read to its end is no success.
func TestMigrateComparesSizes(t *testing.T) {
	dir := t.TempDir()
	exec1(t, filepath.Join(dir, shardName(0)), "CREATE TABLE blobs (key TEXT PRIMARY KEY, data BLOB); INSERT INTO blobs VALUES ('k', zeroblob(300000))")
	s := newTestServer(t)
	m := &migration{call: &call{stdout: io.Discard}, progress: &progress{}, to: s.store, start: time.Now()}
	defer m.close()
	if err := m.open(dir); err != nil {
		t.Fatal(err)
	}
	m.tables[0].column = 0 // another one
	if err := m.copyAll(t.Context()); err == nil || !strings.Contains(err.Error(), "1 bytes could be read of 300000") {
		t.Error(err)
	}
}

// Contents of every length, on pages of every shape, are read from the pages as
// SQLite reads them; large ones in migrate are.
func TestStream(t *testing.T) {
	for _, pageSize := range []int{512, 1024, 4096, 65536} {
		dir := t.TempDir()
		path := filepath.Join(dir, shardName(0))
		exec1(t, path, fmt.Sprintf(`PRAGMA page_size = %d; CREATE TABLE blobs (key TEXT PRIMARY KEY, made REAL, data BLOB, more TEXT);
			WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i+1 FROM n WHERE i < 1500)
			INSERT INTO blobs (rowid, key, made, data, more) SELECT i*i, 'k'||i, nullif(i, 7), randomblob(i), i FROM n;
			INSERT INTO blobs VALUES ('large', 1.5, randomblob(%d), NULL); DELETE FROM blobs WHERE rowid BETWEEN 90000 AND 160000`, pageSize, chunkSize+1))
		m := &migration{call: &call{stdout: io.Discard}}
		if err := m.open(dir); err != nil {
			t.Fatal(err)
		}
		table := m.tables[0]
		err := table.each(func(rowid int64, key string) error {
			var want []byte
			if err := table.shard.readers.QueryRow("SELECT data FROM blobs WHERE rowid = ?", rowid).Scan(&want); err != nil {
				return err
			}
			r, err := table.stream(rowid)
			if err != nil {
				return err
			}
			got, err := io.ReadAll(r)
			if !bytes.Equal(got, want) {
				t.Errorf("page size %d, row %d: %d bytes, want %d", pageSize, rowid, len(got), len(want))
			}
			return err
		})
		if err != nil {
			t.Error(err)
		}
		if _, err := table.stream(90_000); !errors.Is(err, errCorrupt) {
			t.Error("a row that is gone:", err)
		}
		rows, err := table.row.Query(1500*1500 + 1)
		if err != nil {
			t.Fatal(err)
		}
		_, open, err := table.content(rows, 1500*1500+1)
		if err != nil {
			t.Fatal(err)
		}
		if r, err := open(); err != nil {
			t.Error(err)
		} else if _, ok := r.(*pageReader); !ok {
			t.Errorf("a large content is in memory: %T", r)
		}
		rows.Close()
		if err := m.close(); err != nil {
			t.Error(err)
		}
	}
}

// What a server writes to the source meanwhile may be in the copy or not: it is
// no copy then.
func TestMigrateOfWhatIsInUse(t *testing.T) {
	for _, journal := range []string{"wal", "delete"} {
		dir := t.TempDir()
		path := filepath.Join(dir, shardName(0))
		exec1(t, path, "CREATE TABLE blobs (key TEXT PRIMARY KEY, data BLOB); PRAGMA journal_mode = "+journal)
		if err := os.Chtimes(path, time.Time{}, time.Unix(1000, 0)); err != nil { // clocks of file systems are coarse
			t.Fatal(err)
		}
		m := &migration{call: &call{stdout: io.Discard}}
		if err := m.open(dir); err != nil {
			t.Fatal(err)
		}
		if err := m.copyAll(t.Context()); err != nil {
			t.Error(err)
		}
		exec1(t, path, "INSERT INTO blobs VALUES ('k', NULL)")
		m.tables = nil
		if err := m.copyAll(t.Context()); err == nil || !strings.Contains(err.Error(), "stop its server") {
			t.Error(err)
		}
		if err := m.close(); err != nil {
			t.Error(err)
		}
	}
	cfg := testConfig(t)
	serveConfig(t, cfg, stallTimeout).stop()
	m := &migration{call: &call{stdout: io.Discard}}
	if err := m.open(cfg.DataDir); err != nil {
		t.Fatal(err)
	}
	defer m.close()
	if _, err := openStore(cfg, slog.New(slog.DiscardHandler), time.Now); err == nil || !strings.Contains(err.Error(), "in use") {
		t.Error("a server starts on the source:", err)
	}
}

// Half a transaction, which its journal would take back, is not read as a whole.
func TestMigrateHotJournal(t *testing.T) {
	t.Chdir(t.TempDir())
	made, dir := filepath.Join(t.TempDir(), shardName(0)), t.TempDir()
	db := openDB(made, "_pragma=journal_mode(delete)&_pragma=cache_size(2)")
	defer db.Close()
	db.SetMaxOpenConns(1)
	for _, query := range []string{"CREATE TABLE blobs (key TEXT PRIMARY KEY, data BLOB)",
		"INSERT INTO blobs VALUES ('k', zeroblob(100000)), ('l', zeroblob(100000))", "BEGIN", "UPDATE blobs SET data = randomblob(100000)"} {
		if _, err := db.Exec(query); err != nil {
			t.Fatal(err)
		}
	}
	copyFile(t, made, filepath.Join(dir, shardName(0)))
	copyFile(t, made+"-journal", filepath.Join(dir, shardName(0)+"-journal"))
	before := snapshot(t, dir)
	to := filepath.Join(t.TempDir(), "new")
	if code, stdout, stderr := runCommand(t, []string{"BLOBNOM_DATA_DIR=" + to}, "migrate", dir); code != 1 || !strings.Contains(stderr, shardName(0)) || fileExists(to) {
		t.Errorf("code %d, %s%s", code, stdout, stderr)
	}
	if !maps.Equal(before, snapshot(t, dir)) {
		t.Error("the source has changed")
	}
	// What cannot be read is no defect of it.
	os.WriteFile(filepath.Join(dir, lockFile), nil, 0o600)
	if code, stdout, stderr := runCommand(t, nil, "check", dir); code != 1 || !strings.Contains(stderr, "cannot check shard 0") || stdout != "" {
		t.Errorf("check: code %d, %s%s", code, stdout, stderr)
	}
}

// From one shape to another and back nothing changes.
func TestReshard(t *testing.T) {
	t.Chdir(t.TempDir())
	cfg := testConfig(t, func(c *config) { c.StorageCompression = true })
	s := serveConfig(t, cfg, stallTimeout)
	for i, size := range []int{0, 1, 5000, 20_000, chunkSize, 3*chunkSize + 5} {
		for j, kind := range []func(int, uint64) []byte{noise, prose} {
			key := fmt.Sprint("blob/", i, j)
			s.put(key, kind(size, 1), "Content-Type", "a/"+key)
			s.want(201, "PUT", "/blob/"+key+"?ttl=1h", kind(size, 2), "Content-Type", "a/"+key)
		}
	}
	for i := range 500 {
		s.put(oddKey(i), oddBody(i))
	}
	want := s.list(url.Values{"limit": {"10000"}}).Blobs
	bodies := contents(t, cfg.DataDir)
	env := func(dir string, shards int, hash string, more ...string) []string {
		return append(more, "BLOBNOM_DATA_DIR="+dir, fmt.Sprint("BLOBNOM_NUM_SHARDS=", shards), "BLOBNOM_HASH="+hash)
	}
	next := filepath.Join(t.TempDir(), "next")
	if code, _, stderr := runCommand(t, env(next, 7, "fnv1a"), "migrate", cfg.DataDir); code != 1 || !strings.Contains(stderr, "in use") {
		t.Errorf("from under a running server: code %d, %s", code, stderr)
	}
	if err := s.stop(); err != nil {
		t.Fatal(err)
	}
	from := cfg.DataDir
	for i, c := range []struct {
		shards   int
		hash     string
		compress bool
	}{{7, "fnv1a", false}, {3, "sha256", true}, {1, "crc32c", false}, {4, "fnv1a", true}} {
		to := filepath.Join(t.TempDir(), fmt.Sprint("d", i))
		code, stdout, stderr := runCommand(t, env(to, c.shards, c.hash, fmt.Sprint("BLOBNOM_STORAGE_COMPRESSION=", c.compress)), "migrate", from)
		if code != 0 || !strings.Contains(stdout, fmt.Sprintf("%d blobs", len(want))) {
			t.Fatalf("code %d, %s%s", code, stdout, stderr)
		}
		if got := contents(t, to); !maps.EqualFunc(got, bodies, bytes.Equal) {
			t.Errorf("%+v: %d contents, want %d", c, len(got), len(bodies))
		}
		moved := *cfg
		moved.DataDir, moved.NumShards, moved.Hash = to, int64(c.shards), c.hash
		s := serveConfig(t, &moved, stallTimeout)
		if got := s.list(url.Values{"limit": {"10000"}}).Blobs; !slices.Equal(got, want) {
			t.Errorf("%+v: %d rows, want %d", c, len(got), len(want))
		}
		if err := s.stop(); err != nil {
			t.Fatal(err)
		}
		from = to
	}
	if code, _, stderr := runCommand(t, env(from, 4, "fnv1a"), "migrate", cfg.DataDir); code != 1 || !strings.Contains(stderr, "not empty") {
		t.Errorf("over a directory: code %d, %s", code, stderr)
	}
	if code, _, stderr := runCommand(t, env(next, 4, "fnv1a"), "migrate", "-gunzip", cfg.DataDir); code != 1 || !strings.Contains(stderr, "our own format") {
		t.Errorf("-gunzip on our own: code %d, %s", code, stderr)
	}
	// What is damaged does not arrive as if it were whole.
	exec1(t, filepath.Join(cfg.DataDir, shardName(int(hashes["fnv1a"]("blob/50")%4))), "UPDATE chunks SET data = zeroblob(length(data)) WHERE id & 1048575 = 1")
	if code, _, stderr := runCommand(t, env(next, 4, "fnv1a"), "migrate", cfg.DataDir); code != 1 || !strings.Contains(stderr, `key "blob/5`) || fileExists(next) {
		t.Errorf("of a damaged directory: code %d, %s", code, stderr)
	}
	os.RemoveAll(cfg.DataDir) // not for the check at the end
}

// ============================================================================
// All together
// ============================================================================

// TestModel compares the server with a map over random operations.
func TestModel(t *testing.T) {
	if *seed == 0 {
		*seed = rand.Uint64()
	}
	t.Logf("-seed %d", *seed)
	for i := range 8 {
		rnd := rand.New(rand.NewPCG(*seed, uint64(i)))
		m := &model{rnd: rnd, clock: newClock(), blobs: map[string]*modelBlob{}}
		m.cfg = testConfig(t, func(c *config) {
			c.AsyncWrite, c.NumShards, c.BatchSize = i&1 != 0, []int64{1, 4}[i>>1&1], 1+rnd.Int64N(8)
			c.StorageCompression, c.OutputCompression = i&4 != 0, i&4 != 0
		})
		m.start(t)
		steps := 500
		if testing.Short() {
			steps = 150
		}
		for range steps {
			m.step()
			if t.Failed() {
				t.FailNow()
			}
		}
		if err := m.stop(); err != nil {
			t.Fatal(err)
		}
		sums := verifyDir(t, m.cfg.DataDir)
		for key := range m.blobs {
			if b := m.live(key); b != nil && sums[key] != fmt.Sprintf("%x", sha256.Sum256(b.body)) {
				t.Errorf("%q is %s", key, sums[key])
			}
		}
	}
}

// model is a server and the map it is to agree with.
type model struct {
	*testServer
	cfg   *config
	rnd   *rand.Rand
	clock *clock
	blobs map[string]*modelBlob
}

type modelBlob struct {
	body             []byte
	version          int
	created, expires int64
}

func (m *model) start(t *testing.T) { m.testServer = serveAt(t, m.cfg, stallTimeout, m.clock.now) }

// live returns what is to be under key, nil for nothing.
func (m *model) live(key string) *modelBlob {
	if b := m.blobs[key]; b != nil && (b.expires == 0 || b.expires > m.clock.ms.Load()) {
		return b
	}
	return nil
}

func (b *modelBlob) etag() string { return fmt.Sprintf(`"%x"`, sha256.Sum256(b.body)) }

// condition returns a random precondition and whether it holds for b.
func (m *model) condition(b *modelBlob) (headers []string, holds bool) {
	tag, same := `"other"`, false
	if b != nil && m.rnd.IntN(2) == 0 {
		tag, same = b.etag(), true
		if m.rnd.IntN(2) == 0 {
			tag = strings.TrimSuffix(tag, `"`) + `-gzip"`
		}
	} else if m.rnd.IntN(2) == 0 {
		tag, same = "*", b != nil
	}
	if m.rnd.IntN(2) == 0 {
		return []string{"If-Match", tag}, same
	}
	return []string{"If-None-Match", tag}, !same
}

// step does one operation on both.
func (m *model) step() {
	t, rnd := m.t, m.rnd
	t.Helper()
	key := fmt.Sprint("key/", rnd.IntN(12))
	b, now := m.live(key), m.clock.ms.Load()
	accepted := func(committed int) int {
		if m.cfg.AsyncWrite {
			return 202
		}
		return committed
	}
	switch rnd.IntN(12) {
	case 0, 1, 2, 3:
		size := []int{rnd.IntN(100), rnd.IntN(20_000), rnd.IntN(4 * chunkSize)}[rnd.IntN(3)]
		body := prose(size, rnd.Uint64())
		if rnd.IntN(2) == 0 {
			body = noise(size, rnd.Uint64())
		}
		status, headers, path, expires := accepted(201), []string{"Content-Type", "text/plain"}, "/blob/"+key, int64(0)
		if rnd.IntN(3) == 0 {
			condition, holds := m.condition(b)
			headers = append(headers, condition...)
			if status = 201; !holds {
				status = 412
			}
		}
		if rnd.IntN(3) == 0 {
			ttl := 1 + rnd.IntN(60)
			path, expires = fmt.Sprintf("%s?ttl=%d", path, ttl), now+int64(ttl)*1000
		}
		m.want(status, "PUT", path, body, headers...)
		if status == 412 {
			return
		}
		next := &modelBlob{body, 0, now, expires}
		if b != nil {
			next.version, next.created = b.version+1, b.created
		}
		m.blobs[key] = next
	case 4:
		status, headers := accepted(204), []string(nil)
		if rnd.IntN(2) == 0 {
			var holds bool
			headers, holds = m.condition(b)
			if status = 204; !holds {
				status = 412
			}
		}
		if m.want(status, "DELETE", "/blob/"+key, nil, headers...); status != 412 {
			delete(m.blobs, key)
		}
	case 5:
		if b == nil || len(b.body) == 0 {
			return
		}
		from := rnd.IntN(len(b.body))
		to := min(from+rnd.IntN(chunkSize), len(b.body)-1)
		if _, got := m.want(206, "GET", "/blob/"+key, nil, "Range", fmt.Sprintf("bytes=%d-%d", from, to)); !bytes.Equal(got, b.body[from:to+1]) {
			t.Errorf("range %d-%d of %q", from, to, key)
		}
	case 6: // the listing, which also waits for what is queued before the time changes
		var want []string
		for key := range m.blobs {
			if m.live(key) != nil {
				want = append(want, key)
			}
		}
		slices.Sort(want)
		if got := m.listAll("key/", 1+rnd.IntN(12)); !slices.Equal(got, want) {
			t.Errorf("listed %q, want %q", got, want)
		}
		m.clock.advance(time.Duration(rnd.IntN(20)) * time.Second)
	case 7:
		if rnd.IntN(20) == 0 {
			if err := m.stop(); err != nil {
				t.Fatal(err)
			}
			m.cfg.StorageCompression = rnd.IntN(2) == 0
			m.start(t.(*testing.T))
		}
	case 8:
		if b == nil {
			return
		}
		resp, got := m.want(200, "GET", "/blob/"+key, nil, "Accept-Encoding", "gzip")
		if resp.Header.Get("Content-Encoding") == "gzip" {
			got = unzip(t, got)
		}
		if !bytes.Equal(got, b.body) {
			t.Errorf("%q with gzip: %d bytes, want %d", key, len(got), len(b.body))
		}
	default:
		if b == nil {
			m.want(404, "GET", "/blob/"+key, nil)
			return
		}
		h := m.wantBlob(key, b.body).Header
		want := map[string]string{"Blob-Version": strconv.Itoa(b.version), "Blob-Created": stamp(b.created), "Blob-Expires": "", "Etag": b.etag()}
		if b.expires != 0 {
			want["Blob-Expires"] = stamp(b.expires)
		}
		for name, value := range want {
			if h.Get(name) != value {
				t.Errorf("%q: %s %s, want %s", key, name, h.Get(name), value)
			}
		}
	}
}

// TestCrash kills the program under load, again and again: every acknowledged
// write is there, whole, or a later one that was under way.
func TestCrash(t *testing.T) {
	rounds := *soak
	if testing.Short() {
		rounds = 1
	}
	dir := filepath.Join(t.TempDir(), "data")
	type state struct {
		acked  string   // SHA-256 of the last acknowledged content, empty: deleted
		flying []string // of those sent since
	}
	const writers, keys = 16, 4
	states := make([][keys]state, writers)
	for round := range rounds {
		p := startProgram(t, dir, "BLOBNOM_BATCH_SIZE=16", fmt.Sprintf("BLOBNOM_STORAGE_COMPRESSION=%v", round%2 == 0))
		var wg sync.WaitGroup
		var acks atomic.Int64
		for w := range writers {
			wg.Go(func() {
				rnd := rand.New(rand.NewPCG(uint64(round), uint64(w)))
				for {
					k := rnd.IntN(keys)
					st, path := &states[w][k], fmt.Sprintf("/blob/w%d/k%d", w, k)
					method, body, sum := "PUT", []byte(nil), ""
					if rnd.IntN(5) == 0 {
						method = "DELETE"
					} else {
						make := []func(int, uint64) []byte{noise, prose}[rnd.IntN(2)]
						body = make([]int{0, 100, 4096, rnd.IntN(3 << 20)}[rnd.IntN(4)], rnd.Uint64())
						digest := sha256.Sum256(body)
						sum = hex.EncodeToString(digest[:])
					}
					st.flying = append(st.flying, sum)
					resp, _, err := p.do(method, path, bytes.NewReader(body))
					if err != nil {
						return // killed
					}
					if resp.StatusCode != 201 && resp.StatusCode != 204 {
						t.Errorf("%s: %s", method, resp.Status)
						return
					}
					st.acked, st.flying = sum, nil
					acks.Add(1)
				}
			})
		}
		before := acks.Load()
		eventually(t, "acknowledged writes", func() bool { return acks.Load() > before+int64(100+rand.IntN(300)) })
		p.cmd.Process.Kill()
		<-p.done
		wg.Wait()
		p = startProgram(t, dir)
		for w := range writers {
			for k := range keys {
				st, key := &states[w][k], fmt.Sprintf("w%d/k%d", w, k)
				resp, body, err := p.do("GET", "/blob/"+key, nil)
				if err != nil {
					t.Fatal(err)
				}
				sum := ""
				if resp.StatusCode == 200 {
					digest := sha256.Sum256(body)
					sum = hex.EncodeToString(digest[:])
				}
				if sum != st.acked && !slices.Contains(st.flying, sum) {
					t.Errorf("round %d, %s: %s with %q, acknowledged was %q", round, key, resp.Status, sum, st.acked)
				}
				st.acked, st.flying = sum, nil
			}
		}
		eventually(t, "orphans are swept", func() bool { return countRows(t, dir, "SELECT count(*) FROM orphans") == 0 })
		if err := p.signal(syscall.SIGTERM); err != nil {
			t.Fatalf("SIGTERM: %v\n%s", err, p.log)
		}
		verifyDir(t, dir)
	}
}

// TestDrain stops the program in async mode under load: every write answered
// 202 is there after the restart.
func TestDrain(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "data")
	p := startProgram(t, dir, "BLOBNOM_ASYNC_WRITE=true", "BLOBNOM_BATCH_TIMEOUT_MS=30")
	var mu sync.Mutex
	acked := map[string]string{}
	var wg sync.WaitGroup
	for w := range 12 {
		wg.Go(func() {
			for i := 0; ; i++ {
				key, body := fmt.Sprintf("w%d/%d", w, i), noise(i*977%(2*chunkSize), uint64(w*1000+i))
				resp, _, err := p.do("PUT", "/blob/"+key, bytes.NewReader(body))
				if err != nil || resp.StatusCode == 503 {
					return
				}
				if resp.StatusCode != 202 {
					t.Errorf("%s", resp.Status)
					return
				}
				mu.Lock()
				digest := sha256.Sum256(body)
				acked[key] = hex.EncodeToString(digest[:])
				mu.Unlock()
			}
		})
	}
	eventually(t, "load", func() bool { mu.Lock(); defer mu.Unlock(); return len(acked) > 500 })
	if err := p.signal(syscall.SIGTERM); err != nil {
		t.Fatalf("SIGTERM: %v\n%s", err, p.log)
	}
	wg.Wait()
	sums := verifyDir(t, dir)
	for key, sum := range acked {
		if sums[key] != sum {
			t.Errorf("%s was answered 202 and is %q, not %q", key, sums[key], sum)
		}
	}
}

// A second signal ends the program at once, whatever it waits for.
func TestSecondSignal(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("no signals")
	}
	signal.Ignore(syscall.SIGPIPE)
	p := startProgram(t, filepath.Join(t.TempDir(), "data"))
	c, err := net.Dial("tcp", strings.TrimPrefix(p.base, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	fmt.Fprint(c, "PUT /blob/k HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 10\r\n\r\nab") // never ends
	if _, err := io.ReadFull(c, make([]byte, len("HTTP/1.1 100"))); err != nil {
		t.Fatal(err)
	}
	p.cmd.Process.Signal(syscall.SIGTERM)
	eventually(t, "it stops accepting", func() bool { return strings.Contains(p.log.String(), "stopping") })
	start := time.Now()
	err = p.signal(syscall.SIGTERM)
	if exit := (*exec.ExitError)(nil); !errors.As(err, &exit) || time.Since(start) > 5*time.Second {
		t.Errorf("%v after %v", err, time.Since(start))
	}
}

// ============================================================================
// Examples
// ============================================================================

// The quick start of the README.
func Example() {
	dir, err := os.MkdirTemp("", "blobnom")
	if err != nil {
		panic(err)
	}
	defer os.RemoveAll(dir)
	cfg := defaultConfig()
	cfg.DataDir, cfg.NumShards = dir, 4
	st, err := openStore(cfg, slog.New(slog.DiscardHandler), time.Now)
	if err != nil {
		panic(err)
	}
	defer st.close()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		panic(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error)
	go func() { ended <- newServer(cfg, st, slog.New(slog.DiscardHandler)).serve(ctx, cancel, ln) }()
	url := "http://" + ln.Addr().String() + "/blob/greetings/hello.txt"
	request := func(method string, body io.Reader, headers ...string) {
		req, _ := http.NewRequest(method, url, body)
		for i := 0; i < len(headers); i += 2 {
			req.Header.Set(headers[i], headers[i+1])
		}
		resp, err := client.Do(req)
		if err != nil {
			panic(err)
		}
		defer resp.Body.Close()
		text, _ := io.ReadAll(resp.Body)
		fmt.Printf("%s: %d %q\n", method, resp.StatusCode, text)
	}
	request("PUT", strings.NewReader("Hello, blob!\n"), "Content-Type", "text/plain")
	request("GET", nil)
	request("GET", nil, "Range", "bytes=7-10")
	request("DELETE", nil)
	request("GET", nil)
	cancel()
	<-ended
	// Output:
	// PUT: 201 ""
	// GET: 200 "Hello, blob!\n"
	// GET: 206 "blob"
	// DELETE: 204 ""
	// GET: 404 "not found: no blob under this key\n"
}

// ============================================================================
// Benchmarks
//
// Each beside a bare net/http handler that moves the same bytes, same client,
// same run: the ratio counts.
// ============================================================================

func BenchmarkGet(b *testing.B) { benchmark(b, "GET", []string{"full"}) }
func BenchmarkPut(b *testing.B) { benchmark(b, "PUT", []string{"full", "normal", "off", "async"}) }

func benchmark(b *testing.B, method string, modes []string) {
	for _, size := range []int{100, 4 << 10, 64 << 10, 1 << 20} {
		body := noise(size, 1)
		bare := bareServer(b, body)
		b.Run(fmt.Sprintf("%d/bare", size), func(b *testing.B) { drive(b, bare, method, body) })
		for _, mode := range modes {
			for _, batch := range []int64{1, 64} {
				if method == "GET" && batch == 1 {
					continue
				}
				b.Run(fmt.Sprintf("%d/%s-batch%d", size, mode, batch), func(b *testing.B) {
					s := newTestServer(b, func(c *config) {
						c.BatchSize, c.Durability, c.AsyncWrite = batch, mode, mode == "async"
						if c.AsyncWrite {
							c.Durability = "full"
						}
					})
					if method == "GET" {
						for i := range benchKeys {
							s.put(fmt.Sprint(i), body)
						}
					}
					drive(b, s.base, method, body)
				})
			}
		}
	}
}

// BenchmarkCompression moves text with and without compression: at rest, on the
// way out as it lies, and on the way out compressed anew.
func BenchmarkCompression(b *testing.B) {
	for _, size := range []int{4 << 10, 1 << 20} {
		for kind, body := range map[string][]byte{"prose": prose(size, 1), "noise": noise(size, 1)} {
			for _, storage := range []bool{false, true} {
				s := newTestServer(b, func(c *config) { c.Durability, c.StorageCompression, c.OutputCompression = "normal", storage, true })
				name := fmt.Sprintf("%d/%s/storage=%v", size, kind, storage)
				text := []string{"Content-Type", "text/plain"}
				b.Run(name+"/PUT", func(b *testing.B) { drive(b, s.base, "PUT", body, text...) })
				for i := range benchKeys {
					s.put(fmt.Sprint(i), body, text...)
				}
				b.Run(name+"/GET", func(b *testing.B) { drive(b, s.base, "GET", body) })
				if kind == "prose" {
					b.Run(name+"/GET-gzip", func(b *testing.B) { drive(b, s.base, "GET", body, "Accept-Encoding", "gzip") })
				}
			}
		}
	}
}

// BenchmarkList takes pages of 1,000 out of 10,000 and of 200,000 blobs.
func BenchmarkList(b *testing.B) {
	for _, n := range []int{10_000, 200_000} {
		s := newTestServer(b, func(c *config) { c.Durability = "off" })
		for _, sh := range s.store.shards { // 20 times as fast as by HTTP
			exec1(b, filepath.Join(s.store.dir, shardName(sh.index)), fmt.Sprintf(`INSERT INTO blobs
				WITH RECURSIVE n (i) AS (SELECT %d UNION ALL SELECT i + %d FROM n WHERE i + %[2]d < %d)
				SELECT i + 1, printf('key/%%08d', i), 4096, x'%064x', 0, 4096, NULL, 'text/plain', 0, 0, NULL, 0, randomblob(4096) FROM n`,
				sh.index, len(s.store.shards), n, 0))
		}
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			for b.Loop() {
				p := s.list(url.Values{"after": {fmt.Sprintf("key/%08d", rand.IntN(n-1001))}})
				if len(p.Blobs) != 1000 {
					b.Fatal(len(p.Blobs))
				}
			}
		})
		for _, sh := range s.store.shards { // misplaced and of a wrong sum: not for the check at the end
			exec1(b, filepath.Join(s.store.dir, shardName(sh.index)), "DELETE FROM blobs")
		}
	}
}

// BenchmarkMaintenance runs the commands over 200 MB, half of it in small blobs.
func BenchmarkMaintenance(b *testing.B) {
	cfg := testConfig(b)
	s := serveConfig(b, cfg, stallTimeout)
	var size int64
	for i := range 400 {
		body := noise([]int{4 << 10, 1 << 20}[i%2], uint64(i))
		for j := range []int{128, 1}[i%2] {
			s.put(fmt.Sprint(i, "/", j), body)
			size += int64(len(body))
		}
	}
	if err := s.stop(); err != nil {
		b.Fatal(err)
	}
	for _, name := range []string{"check", "backup", "migrate"} {
		b.Run(name, func(b *testing.B) {
			b.SetBytes(size)
			for b.Loop() {
				to := filepath.Join(b.TempDir(), "to")
				args, from := []string{name}, cfg.DataDir
				switch name {
				case "backup":
					args = append(args, to)
				case "migrate":
					args, from = append(args, cfg.DataDir), to
				}
				if code, _, stderr := runCommand(b, []string{"BLOBNOM_DATA_DIR=" + from, "BLOBNOM_NUM_SHARDS=4"}, args...); code != 0 {
					b.Fatal(stderr)
				}
				os.RemoveAll(to)
			}
		})
	}
}

const benchKeys = 256

func bareServer(b *testing.B, body []byte) string {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	hs := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == "GET" {
			w.Write(body)
			return
		}
		io.Copy(io.Discard, r.Body)
		w.WriteHeader(http.StatusCreated)
	})}
	go hs.Serve(ln)
	b.Cleanup(func() { hs.Close() })
	return "http://" + ln.Addr().String()
}

// drive sends requests over 32 connections.
func drive(b *testing.B, base, method string, body []byte, headers ...string) {
	b.SetBytes(int64(len(body)))
	b.SetParallelism(max(1, 32/runtime.GOMAXPROCS(0)))
	b.ResetTimer()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			u, _ := url.Parse(fmt.Sprintf("%s/blob/%d", base, rand.IntN(benchKeys)))
			req := &http.Request{Method: method, URL: u, Header: http.Header{}}
			for i := 0; i < len(headers); i += 2 {
				req.Header.Set(headers[i], headers[i+1])
			}
			if method == "PUT" {
				req.Body, req.ContentLength = io.NopCloser(bytes.NewReader(body)), int64(len(body))
			}
			resp, err := client.Do(req)
			if err != nil {
				b.Error(err)
				return
			}
			if n, err := io.Copy(io.Discard, resp.Body); err != nil || resp.StatusCode/100 != 2 || method == "GET" && n != int64(len(body)) && resp.Header.Get("Content-Encoding") == "" {
				b.Errorf("%s, %d bytes, %v", resp.Status, n, err)
			}
			resp.Body.Close()
		}
	})
}
