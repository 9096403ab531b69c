/*
Blobnom is a small, durable blob server: HTTP over a set of SQLite databases (shards). A hash of the
key chooses the shard. "blobnom help" lists the commands: serve, check, backup, migrate and others.

A session, with the server started by "go run ." in another terminal:

	$ curl --fail-with-body -T cat.jpg localhost:3000/blob/photos/cat.jpg
	$ curl -f -o copy.jpg localhost:3000/blob/photos/cat.jpg
	$ curl -f 'localhost:3000/blob/?prefix=photos/&limit=100'
	$ curl --fail-with-body -T note.txt -H 'If-None-Match: *' 'localhost:3000/blob/note.txt?ttl=1h'
	$ curl -f -X DELETE localhost:3000/blob/photos/cat.jpg

A key is the rest of the path after /blob/, percent-decoded: 1 to 1,024 bytes of UTF-8 without NUL.
Slashes and empty segments are part of the key. The answer 201 or 204 means that the write is
committed and, with durability = "full", synced to disk. With async_write the answer is 202: the
write is queued, and a later read of the key waits for it.

The configuration is one TOML file, described in config.toml.example. Every key can also be given in
the environment, as BLOBNOM_<KEY>.

This file is meant to be read from top to bottom. On its way from the socket to the disk a PUT
passes through HTTP server, Access, Handlers, Fields, Store, Writes, Batcher and Writer. These are
all the chapters, in their order:

	Vocabulary      limits, the schema of a shard, a blob
	Errors          what can go wrong, and what a client is told
	Commands        main, the command line, serve, sign
	Configuration   file, environment, defaults
	HTTP server     routes, errors as answers, shutdown
	Handlers        one function per request
	Pages           what a browser shows
	Fields          what headers and queries ask for
	Access          who may do what: tokens, signed URLs
	Store           which shard has a key; listings
	Directory       locking, creating, opening and refusing a data directory
	Shard           one database: its connections, and whether it is well
	Reads           looking for a row
	Writes          receiving a content and queueing its write
	Batcher         one goroutine per shard groups writes into transactions
	Writer          the SQL of those writes, and what a failure means
	Codec           deflated content, and how it becomes a gzip answer
	Cache           small committed contents in memory
	Reader          the position of one download
	Metrics         what Prometheus is told
	Upkeep          expiry, reclaiming space, surviving a full disk
	Sources         how the next three read a data directory
	Check           verifying a data directory
	Backup          copying a data directory, and when a copy is complete
	Migrate         copying blobs between directories
	Transport       deadlines, connections, certificate

To work on it: .ci/run is the gate; "go test -run TestCrash -soak 100" kills the server a hundred
times; "go test -run xxx -bench ." measures; "go test -fuzz FuzzKeys", or another target, fuzzes.
*/
package main

import (
	"bytes"
	"cmp"
	"compress/flate"
	"context"
	"crypto/hmac"
	"crypto/md5"
	"crypto/rand"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/tls"
	"database/sql"
	_ "embed"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"hash"
	"hash/crc32"
	"hash/fnv"
	"html/template"
	"io"
	"io/fs"
	"iter"
	"log"
	"log/slog"
	"maps"
	"math"
	"mime"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/signal"
	"path"
	"path/filepath"
	"regexp"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unicode/utf8"

	"github.com/BurntSushi/toml"
	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"
)

// ==== Vocabulary =================================================================================
// What the other chapters share: limits with the reason for their value, the schema of a shard, and
// a blob.

const (
	applicationID = 0x426c6f62 // "Blob", in the SQLite header of our files: file(1) shows it
	schemaVersion = 1          // the header's user_version

	maxKeyBytes = 1024               // of a key, decoded
	maxTTL      = 876000 * time.Hour // just under a hundred years
	maxShards   = 1000
	defaultPage = 1000   // blobs in a page of the listing
	maxPage     = 10_000 // the most that a client may ask for

	// chunkSize is the largest content that is stored in its row; a larger one goes through the
	// chunks table. An upload holds two chunks in memory, a download one and SQLite's copy. Chunks
	// of 64 and 128 KiB add a fifth and 6 % to the CPU time of a GET of 1 MiB; 512 KiB save 1 %.
	chunkSize   = 256 << 10
	seqBits     = 20                   // low bits of a chunk's id, its sequence number
	hardMaxBlob = chunkSize << seqBits // 256 GiB, even if max_blob_bytes is 0

	// A batch ends at batchBytes. Larger ones would delay small writes and let the WAL outgrow the
	// reserve.
	batchBytes   = 1 << 20
	opOverhead   = 2 << 10 // bytes of a queued write besides key and content
	reserveBytes = 6 << 20 // more than a WAL grows to, unless a reader keeps it long: see Upkeep

	// newPageBytes is the size of the pages of a new shard; each shard keeps its own. Each page of
	// a chunk costs system calls: 8 KiB would save 10 % of the CPU time of a GET of 1 MiB, and 17 %
	// of a POST. But a blob of 4 KiB would take 8.3 KiB on the disk instead of 4.7, and there would
	// be 16 % fewer POSTs of new blobs a second, and 25 % fewer of a few keys again and again.
	newPageBytes = 4 << 10

	// A shard's WAL is copied into the database once checkpointBytes are in it. With half as much,
	// 3 % fewer writes fit into a second; with twice as much, the 99th percentile of their time is
	// a third longer.
	checkpointBytes = 2 << 20

	// cacheBytes bounds the committed contents kept for readers, over all shards: 20,000 of 4 KiB.
	// A small GET takes 60 µs from SQLite and 20 µs from the cache. cacheItem is the largest
	// content that is cached.
	cacheBytes = 96 << 20
	cacheItem  = 64 << 10

	blobMethods = "GET, HEAD, PUT, POST, DELETE" // of a key
	octetStream = "application/octet-stream"     // the type of a blob without one
	minDeflate  = 256                            // bytes; a smaller content is not deflated at rest
	minEncode   = 1 << 10                        // bytes; a smaller one not for an answer either

	stallTimeout  = 60 * time.Second // for a step of an upload: see Transport
	drainTimeout  = 15 * time.Second // finishing requests after a signal
	sweepInterval = time.Second      // between two looks of upkeep

	// A writer waits for room in the queue at most queueTimeout. If another process has locked a
	// shard, an attempt to write fails after busyTimeout, and so do the writes in the queue that
	// have waited as long. So nobody waits longer than both together, or than two busyTimeouts.
	queueTimeout = 5 * time.Second
	busyTimeout  = 4 * time.Second
)

// schema is a shard. A content of at most one chunk is stored in its row; a larger one in chunks,
// whose ids begin with the blob's id. At every instant each content id in chunks is also in blobs
// or in orphans. So a crash leaves the old content or the new one, and orphans is what is swept.
const schema = `
CREATE TABLE IF NOT EXISTS blobs (
	id           INTEGER PRIMARY KEY, -- of the content; a new one whenever chunks come or go
	key          TEXT NOT NULL UNIQUE,
	size         INTEGER NOT NULL,    -- bytes, as the client sees them
	sha256       BLOB NOT NULL,       -- of those bytes
	codec        INTEGER NOT NULL,    -- of the stored content: 0 identity, 1 deflate
	stored       INTEGER NOT NULL,    -- bytes of the stored content
	crc32        INTEGER,             -- of the bytes as the client sees them; NULL: 0, not compared
	content_type TEXT NOT NULL,
	created_at   INTEGER NOT NULL,    -- Unix milliseconds, as are the next two
	updated_at   INTEGER NOT NULL,
	expires_at   INTEGER,             -- NULL: never
	version      INTEGER NOT NULL,    -- 0 at creation, +1 a replacement
	data         BLOB                 -- NULL: in chunks; last, so that metadata reads skip it
);

-- Permanent blobs cost nothing here.
CREATE INDEX IF NOT EXISTS expiring ON blobs (expires_at) WHERE expires_at IS NOT NULL;

CREATE TABLE IF NOT EXISTS chunks (
	id   INTEGER PRIMARY KEY, -- content id << 20 | sequence number
	data BLOB NOT NULL
);

-- Content ids that no blob refers to, not yet or not any more.
CREATE TABLE IF NOT EXISTS orphans (id INTEGER PRIMARY KEY);

-- num_shards, shard, hash, directory
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value);
`

// blob is a content and its metadata, committed or about to be. It is immutable once a reader or
// the queue has it. Times are Unix milliseconds.
type blob struct {
	id          int64
	size        int64  // bytes, as the client sees them
	stored      int64  // bytes, as they are in the shard
	deflated    bool   // stored deflated: see Codec
	crc         uint32 // of the content as the client sees it; 0: not compared
	sum         [sha256.Size]byte
	contentType string
	created     int64
	updated     int64
	expires     int64 // 0: never
	version     int64
	data        []byte     // stored content; of a chunked blob being written, its last chunk
	header      [10]string // values of an answer's headers: see headerNames
}

// chunked reports whether the content is in the chunks table. The size alone decides that.
func (b *blob) chunked() bool { return b.size > chunkSize }

// lastSeq returns the sequence number of the last chunk; 0 for an empty blob, too.
func (b *blob) lastSeq() int64 { return (b.size - 1) / chunkSize }

// expired reports whether b has expired at now, in Unix milliseconds.
func (b *blob) expired(now int64) bool { return b.expires != 0 && b.expires <= now }

// ==== Errors =====================================================================================
// What can go wrong, as the other chapters test for it and as a client is told. Errors of the
// driver and of files are translated where the driver is called.

// statusError is an error that means something to a client. An error may wrap one together with its
// cause. For a status of 500 and above the client sees the statusError alone, and the log all of
// it.
type statusError struct {
	status int
	text   string
}

func (e *statusError) Error() string { return e.text }

func newError(status int, text string) *statusError { return &statusError{status, text} }

var (
	errBadRequest = newError(http.StatusBadRequest, "bad request")

	// errUnauthorized gives a reason only for a signature.
	errUnauthorized = newError(http.StatusUnauthorized, "unauthorized")

	errReadOnly = newError(http.StatusForbidden, "the read token opens GET and HEAD only")
	errForeign  = newError(http.StatusForbidden,
		"a page of another origin may not write, see cors_origin")
	errNoBlob    = newError(http.StatusNotFound, "not found: no blob under this key")
	errNoRoute   = newError(http.StatusNotFound, "not found: blobs are at /blob/KEY")
	errCondition = newError(http.StatusPreconditionFailed, "precondition failed")
	errTooLarge  = newError(http.StatusRequestEntityTooLarge, "blob too large")
	errRange     = newError(http.StatusRequestedRangeNotSatisfiable, "range not satisfiable")

	// errInternal stands for any error without a status.
	errInternal   = newError(http.StatusInternalServerError, "internal error")
	errCorrupt    = newError(http.StatusInternalServerError, "shard is corrupt")
	errCannotOpen = newError(http.StatusInternalServerError, "shard cannot be opened")
	errNotSynced  = newError(http.StatusInternalServerError,
		"a sync of the disk failed; restart the server")
	errDamaged = newError(http.StatusInternalServerError,
		"the blob is damaged; restore it or delete it")
	errBusy     = newError(http.StatusServiceUnavailable, "too busy, try again")
	errStopping = newError(http.StatusServiceUnavailable, "server is stopping")
	errNoFiles  = newError(http.StatusServiceUnavailable,
		"out of file descriptors; raise the limit (ulimit -n, LimitNOFILE)")
	errFull = newError(http.StatusInsufficientStorage, "disk full")

	errClientGone = errors.New("the client broke off") // nobody is left to answer
	errNewer      = errors.New("written by a newer version of this server; use that one")
)

// statusOf returns the status of err and what its client is told: all of a 4xx, which is about the
// request, but only the kind of a 5xx.
func statusOf(err error) (status int, text string) {
	kind := errInternal
	errors.As(err, &kind) // leaves errInternal for an error without a status
	if kind.status >= 500 {
		return kind.status, kind.text
	}
	return kind.status, err.Error()
}

func badRequest(format string, args ...any) error {
	return fmt.Errorf("%w: %s", errBadRequest, fmt.Sprintf(format, args...))
}

// translate maps an error of the driver or of a file to the error that the other chapters test for.
func translate(err error) error {
	if err == nil || errors.As(err, new(*statusError)) { // translated already
		return err
	}
	code, extended := sqliteCode(err)
	var meaning *statusError
	switch {
	case code == sqlite3.SQLITE_FULL, extended == sqlite3.SQLITE_IOERR_SHMSIZE, isNoSpace(err):
		meaning = errFull // SHMSIZE: the -shm file could not grow
	case code == sqlite3.SQLITE_CORRUPT, code == sqlite3.SQLITE_NOTADB:
		meaning = errCorrupt
	case code == sqlite3.SQLITE_BUSY, code == sqlite3.SQLITE_LOCKED:
		meaning = errBusy
	case extended == sqlite3.SQLITE_IOERR_FSYNC, extended == sqlite3.SQLITE_IOERR_DIR_FSYNC:
		meaning = errNotSynced
	case isOutOfFiles(err), code == sqlite3.SQLITE_CANTOPEN && outOfFiles():
		meaning = errNoFiles
	case code == sqlite3.SQLITE_CANTOPEN,
		code == sqlite3.SQLITE_READONLY,
		code == sqlite3.SQLITE_PERM:
		meaning = errCannotOpen
	default:
		return err
	}
	return fmt.Errorf("%w: %w", meaning, err)
}

// sqliteCode returns the result code in err and the extended one, or zeros if err is not SQLite's.
func sqliteCode(err error) (code, extended int) {
	if e, ok := errors.AsType[*sqlite.Error](err); ok {
		return e.Code() & 0xff, e.Code()
	}
	return 0, 0
}

// schemaError returns an error of reading the tables of a shard as errCorrupt, if SQLite did not
// understand the query, or database/sql not the type of a value: then the tables are not those of a
// shard.
func schemaError(err error) error {
	if err == nil || errors.Is(err, errNewer) || errors.As(err, new(*statusError)) {
		return err
	}
	code, _ := sqliteCode(err)
	isOfValue := code == 0
	if isOfValue || code == sqlite3.SQLITE_ERROR {
		return fmt.Errorf("%w: %w", errCorrupt, err)
	}
	return err
}

// isNoSpace reports whether a disk, a quota or a file's maximum size is reached.
func isNoSpace(err error) bool {
	return errors.Is(err, syscall.ENOSPC) ||
		errors.Is(err, syscall.EDQUOT) ||
		errors.Is(err, syscall.EFBIG)
}

// isCorrupt reports whether SQLite or this program finds a file damaged. SQLite also says so of a
// read that has failed with EIO: the caller tries again before it believes that.
func isCorrupt(err error) bool { return errors.Is(translate(err), errCorrupt) }

func isOutOfFiles(err error) bool {
	return errors.Is(err, syscall.EMFILE) || errors.Is(err, syscall.ENFILE)
}

// outOfFiles reports whether the files of a connection cannot be opened. SQLite does not say why it
// failed, and has closed what it had opened. So the program tries it, too.
func outOfFiles() bool {
	const needed = 6 // the database, its WAL, its shared memory, the directory, and some to spare
	for range needed {
		f, err := os.Open(".")
		if err != nil {
			return isOutOfFiles(err)
		}
		defer f.Close()
	}
	return false
}

// ==== Commands ===================================================================================
// main only calls run, which tests call as well. The table of commands drives both the dispatch and
// the help. Exit codes: 0 done, 1 failed or refused, 2 wrong usage or configuration. Results go to
// standard output, logs and progress to standard error.

func main() {
	os.Exit(run(context.Background(), os.Args[1:], os.Environ(), os.Stdout, os.Stderr))
}

// run executes one command line and returns the exit code. An error is one line on stderr.
func run(ctx context.Context, args, environ []string, stdout, stderr io.Writer) int {
	cli := &call{environ: environ, stdout: stdout, stderr: stderr}
	err := cli.dispatch(ctx, args)
	if err == nil {
		return 0
	}
	// errors.Join puts a newline between two errors.
	line := strings.ReplaceAll(err.Error(), "\n", "; ")
	fmt.Fprintln(stderr, "blobnom:", line)
	if errors.As(err, new(usageError)) {
		return 2
	}
	return 1
}

// usageError describes a mistake in a command line or in a configuration.
type usageError string

func (e usageError) Error() string { return string(e) + "; see: blobnom help" }

// call is one command line.
type call struct {
	configFile     string
	method         string        // of sign
	ttl            time.Duration // of sign
	args, environ  []string
	stdout, stderr io.Writer
	progress       progress
}

// command is a row of the table: how a command is called, explained and run.
type command struct {
	name             string
	args             string // as help shows them
	summary          string
	details          string // shown by COMMAND -h only
	minArgs, maxArgs int
	isLong           bool                                 // see runLong
	addFlags         func(cli *call, flags *flag.FlagSet) // nil: none of its own
	run              func(ctx context.Context, cli *call) error
}

func commands() []command {
	return []command{
		{name: "serve", summary: "run the server (the default command)", run: cmdServe},
		{
			name:    "check",
			args:    "[DIR]",
			summary: "verify a data directory: structure, placement, every checksum",
			details: "DIR is data_dir by default. A server may be using it. Each defect is a line.",
			maxArgs: 1,
			isLong:  true,
			run:     cmdCheck,
		},
		{
			name:    "backup",
			args:    "DIR",
			summary: "copy the data directory into DIR, also while the server runs",
			details: "DIR is new, empty, or has what an interrupted run left.\n" +
				"To restore, remove shard_* from the data directory, and copy all files of DIR.",
			minArgs: 1,
			maxArgs: 1,
			isLong:  true,
			run:     cmdBackup,
		},
		{
			name:    "migrate",
			args:    "SRC",
			summary: "copy every blob of SRC into the configured, new data directory",
			details: "SRC may have other shards, another hash or codec, " +
				"or be of the Rust Blobnom.\n" +
				"No server may be using it. It stays as it is.",
			minArgs: 1,
			maxArgs: 1,
			isLong:  true,
			run:     cmdMigrate,
		},
		{
			name:    "sign",
			args:    "[-method M] [-ttl D] KEY",
			summary: "print a signed URL path for KEY that expires",
			details: "  -method M  what it allows: GET (the default, HEAD too), HEAD, PUT, POST " +
				"or DELETE\n" +
				"  -ttl D     how long it is valid: 1h (the default), 90s, 7d, or whole seconds",
			minArgs:  1,
			maxArgs:  1,
			addFlags: signFlags,
			run:      cmdSign,
		},
		{name: "version", summary: "print the version", run: cmdVersion},
		{
			name:    "help",
			args:    "[COMMAND]",
			summary: "explain a command; \"help config\" prints the example configuration",
			maxArgs: 1,
			run:     cmdHelp,
		},
	}
}

func commandNamed(name string) (command, error) {
	for _, row := range commands() {
		if row.name == name {
			return row, nil
		}
	}
	return command{}, usageError(fmt.Sprintf("there is no command %q", name))
}

// dispatch parses the command line and runs the command. The flags of a command stand behind its
// name, -config and -version before or behind it.
func (cli *call) dispatch(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet("blobnom", flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	flags.StringVar(&cli.configFile, "config", "", "")
	showVersion := flags.Bool("version", false, "")
	err := flags.Parse(args)
	cli.args = flags.Args() // of "blobnom -h sign": cmdHelp explains sign
	if errors.Is(err, flag.ErrHelp) {
		return cmdHelp(ctx, cli)
	}
	if err != nil {
		return usageError(err.Error())
	}
	name := "serve"
	if len(cli.args) > 0 {
		name = cli.args[0]
		cli.args = cli.args[1:]
	}
	row, err := commandNamed(name)
	if err != nil {
		return err
	}
	if row.addFlags != nil {
		row.addFlags(cli, flags)
	}
	err = flags.Parse(cli.args)
	cli.args = flags.Args()
	switch {
	case errors.Is(err, flag.ErrHelp):
		cli.showHelp(row)
		return nil
	case err != nil:
		return usageError(err.Error())
	case *showVersion:
		return cmdVersion(ctx, cli)
	case len(cli.args) < row.minArgs || len(cli.args) > row.maxArgs:
		wanted := cmp.Or(row.args, "none")
		return usageError(fmt.Sprintf("the arguments of %s are: %s", name, wanted))
	}
	if row.isLong {
		return cli.runLong(ctx, row)
	}
	return row.run(ctx, cli)
}

// cmdHelp prints the table, or explains what its first argument names.
func cmdHelp(_ context.Context, cli *call) error {
	if len(cli.args) == 0 {
		fmt.Fprint(cli.stdout, "usage: blobnom [-config FILE] [COMMAND] [ARGUMENTS]\n\n")
		for _, row := range commands() {
			fmt.Fprintf(cli.stdout, "  %-32s %s\n", row.name+" "+row.args, row.summary)
		}
		fmt.Fprint(cli.stdout, "\nFILE is config.toml if there is one, "+
			"else the built-in example.\n")
		return nil
	}
	if cli.args[0] == "config" {
		fmt.Fprint(cli.stdout, exampleConfig)
		return nil
	}
	row, err := commandNamed(cli.args[0])
	if err != nil {
		return err
	}
	cli.showHelp(row)
	return nil
}

func (cli *call) showHelp(row command) {
	usage := strings.TrimSpace(row.name + " " + row.args)
	fmt.Fprintf(cli.stdout, "usage: blobnom [-config FILE] %s\n\n%s\n", usage, row.summary)
	if row.details != "" {
		fmt.Fprintln(cli.stdout, row.details)
	}
}

func cmdVersion(_ context.Context, cli *call) error {
	platform := runtime.GOOS + "/" + runtime.GOARCH
	fmt.Fprintln(cli.stdout, "blobnom", version(), runtime.Version(), platform)
	return nil
}

// version returns the version of the module that was built: a tag, the revision of the checkout, or
// "devel", which Go writes in parentheses.
func version() string {
	info, _ := debug.ReadBuildInfo() // fails only without modules, which the dependencies need
	return strings.Trim(info.Main.Version, "()")
}

// config loads the configuration and says where it came from.
func (cli *call) config() (*config, string, error) {
	cfg, origin, err := loadConfig(cli.configFile, cli.environ)
	if err != nil {
		return nil, "", err
	}
	for _, entry := range cli.environ {
		name, _, _ := strings.Cut(entry, "=") // the value may be a secret
		isNamed := func(s setting) bool { return s.variable() == name }
		if strings.HasPrefix(name, "BLOBNOM_") && !slices.ContainsFunc(cfg.settings(), isNamed) {
			const text = "environment variable names no configuration key, and is ignored"
			newLogger(cfg, cli.stderr).Warn(text, "variable", name)
		}
	}
	return cfg, origin, nil
}

func newLogger(cfg *config, w io.Writer) *slog.Logger {
	var level slog.Level
	level.UnmarshalText([]byte(cfg.LogLevel)) // cannot fail: loadConfig has checked the word
	options := &slog.HandlerOptions{Level: level}
	if cfg.LogFormat == "json" {
		return slog.New(slog.NewJSONHandler(w, options))
	}
	return slog.New(slog.NewTextHandler(w, options))
}

// cmdServe runs until a signal or the end of ctx, then drains. A second signal ends it at once.
func cmdServe(ctx context.Context, cli *call) error {
	cfg, origin, err := cli.config()
	if err != nil {
		return err
	}
	logger := newLogger(cfg, cli.stderr)
	signals := []os.Signal{os.Interrupt, syscall.SIGTERM}
	if !signal.Ignored(syscall.SIGHUP) { // nohup ignores it: then it stays ignored
		signals = append(signals, syscall.SIGHUP)
	}
	signal.Ignore(syscall.SIGPIPE) // else the server would end when the reader of its log ends
	ctx, stop := signal.NotifyContext(ctx, signals...)
	context.AfterFunc(ctx, stop) // after the first signal: a second one kills the process

	// The port before the directory: a server that cannot listen leaves no trace.
	listener, err := listen(cfg.Addr)
	if err != nil {
		return fmt.Errorf("cannot listen on addr %q: %w", cfg.Addr, err)
	}
	defer listener.Close()
	limitMemory(logger)
	st, err := openStore(ctx, cfg, logger, time.Now)
	if errors.Is(err, context.Canceled) {
		logger.Info("stopped while starting")
		return nil
	}
	if err != nil {
		return err
	}
	address := listener.Addr().(*net.TCPAddr)
	logger.Info("serving",
		"version", version(),
		"listen", address.String(),
		"url", urlOf(cfg, address),
		"config", origin,
		"data_dir", cfg.DataDir,
		"num_shards", cfg.NumShards,
		"durability", cfg.Durability)
	if cfg.AuthToken == "" && !address.IP.IsLoopback() {
		logger.Warn("anyone who can reach this address can read and change every blob; " +
			"set auth_token or a local addr")
	}
	// The ballast takes no memory, because nothing touches it, but the heap may grow by as much
	// before it is collected. Without it a small heap is collected every 200 POSTs, which is 3 % of
	// the server's time. SetGCPercent would do as much, but would also multiply the heap of a full
	// cache.
	ballast := make([]byte, 16<<20)
	defer runtime.KeepAlive(ballast)
	serveErr := newServer(cfg, st, logger).serve(ctx, listener)
	closeErr := st.close()
	if serveErr != nil || closeErr != nil {
		return errors.Join(serveErr, closeErr)
	}
	logger.Info("stopped")
	return nil
}

// urlOf returns what to open in a browser on this machine.
func urlOf(cfg *config, address *net.TCPAddr) string {
	scheme := "http"
	if cfg.TLSCert != "" {
		scheme = "https"
	}
	host := address.String()
	if address.IP.IsUnspecified() {
		host = fmt.Sprintf("localhost:%d", address.Port)
	}
	return scheme + "://" + host + "/"
}

func signFlags(cli *call, flags *flag.FlagSet) {
	flags.StringVar(&cli.method, "method", http.MethodGet, "")
	cli.ttl = time.Hour
	flags.Func("ttl", "", func(text string) (err error) {
		cli.ttl, err = parseTTL(text)
		return err
	})
}

// cmdSign prints a path that needs no token until it expires. Notes about the key go to stderr, so
// that a script gets the path alone.
func cmdSign(_ context.Context, cli *call) error {
	cfg, origin, err := cli.config()
	if err != nil {
		return err
	}
	key := cli.args[0]
	if err := checkKey(key); err != nil {
		return usageError(err.Error())
	}
	if !slices.Contains(strings.Split(blobMethods, ", "), cli.method) {
		return usageError("-method is one of " + blobMethods)
	}
	if cfg.AuthToken == "" {
		return usageError("auth_token in " + origin + " is empty; a signature needs it as its key")
	}
	urlPath := pathOf(key)
	if urlPath == "" { // the key has a dot segment
		urlPath = escapeAll(key)
		fmt.Fprintln(cli.stderr, `note: browsers and many clients resolve the "." or ".." `+
			"segment, even percent-encoded, and get 401; curl --path-as-is does not")
	}
	if rest, isPath := strings.CutPrefix(key, "/blob/"); isPath {
		fmt.Fprintf(cli.stderr, "note: this key begins with /blob/, which is not part of a key; "+
			"did you mean %q?\n", rest)
	}
	expires := strconv.FormatInt(time.Now().Add(cli.ttl).Unix(), 10)
	signature := sign(cfg.AuthToken, cli.method, key, expires)
	fmt.Fprintf(cli.stdout, "/blob/%s?expires=%s&sig=%s\n", urlPath, expires, signature)
	return nil
}

const noLimit = 1 << 60 // bytes; version 1 of control groups has a larger number for "none"

// limitMemory keeps Go's memory below half of what the container or service may have. The rest is
// for SQLite, which Go does not count, and for what is allocated during a garbage collection.
// Without the limit the heap may double before it is collected, and the kernel kills the process.
// With GOMEMLIMIT in the environment Go has set its limit itself. limitMemory is called before
// openStore, which calls cacheLimit, which reads the limit.
func limitMemory(logger *slog.Logger) {
	limit := cgroupLimit("/")
	if limit == noLimit || os.Getenv("GOMEMLIMIT") != "" {
		return
	}
	debug.SetMemoryLimit(limit / 2)
	logger.Info("memory is limited by the control group",
		"bytes", limit, "go_memory_limit", limit/2)
}

// cgroupLimit returns the smallest memory limit, in bytes, of the control groups that the process
// is in and of those above, and noLimit without one. /proc/self/cgroup has lines such as
// 0::/system.slice/x.service (version 2) or 4:memory:/docker/x (version 1). In a container that
// path may be the host's; then the limit is at the top. root is "/" except in tests.
func cgroupLimit(root string) int64 {
	limit := int64(noLimit)
	mount := filepath.Join(root, "sys/fs/cgroup")
	groups, _ := os.ReadFile(filepath.Join(root, "proc/self/cgroup")) // only Linux has it
	for line := range strings.Lines(string(groups)) {
		_, line, _ = strings.Cut(strings.TrimSpace(line), ":")
		controllers, group, _ := strings.Cut(line, ":")
		if controllers == "" {
			limit = min(limit, smallestLimit(mount, group, "memory.max"))
		}
		if strings.Contains(controllers, "memory") {
			mount1 := filepath.Join(mount, "memory")
			limit = min(limit, smallestLimit(mount1, group, "memory.limit_in_bytes"))
		}
	}
	return limit
}

// smallestLimit returns the smallest number in the files of this name, of a group and of those
// above it.
func smallestLimit(mount, group, name string) int64 {
	limit := int64(noLimit)
	group = path.Join("/", group)
	for {
		text, _ := os.ReadFile(filepath.Join(mount, group, name))
		number, err := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64)
		if err == nil { // else there is no file, or it has the word "max"
			limit = min(limit, number)
		}
		if group == "/" {
			return limit
		}
		group = path.Dir(group)
	}
}

// runLong runs a command that SIGINT and SIGTERM interrupt, and that shows its progress on a
// terminal. Nothing has to be undone after a signal: an incomplete copy has its marker.
func (cli *call) runLong(ctx context.Context, row command) error {
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop) // from then on another signal kills the process
	if isTerminal(cli.stderr) {
		cli.showProgress()
		defer cli.progress.hide()
	}
	err := row.run(ctx, cli)
	left := cli.progress.leaves
	if err != nil && ctx.Err() != nil {
		left = cmp.Or(left, "nothing was changed")
		return fmt.Errorf("interrupted; %s; run the same command again, it starts over", left)
	}
	if err != nil && left != "" {
		return fmt.Errorf("%s: %w", left, err)
	}
	return err
}

// isTerminal reports whether w is a terminal, or another device such as /dev/null.
func isTerminal(w io.Writer) bool {
	file, _ := w.(*os.File)
	info, err := file.Stat() // fails for nil
	return err == nil && info.Mode()&os.ModeCharDevice != 0
}

const (
	drawInterval = 500 * time.Millisecond
	clearLine    = "\r\x1b[K"
)

// progress is the status line of a long command. A timer draws it, because SQLite may work on one
// shard for minutes without a word.
type progress struct {
	leaves string // what an interruption leaves; "" for nothing

	mu       sync.Mutex // guards the rest, and the output of the command
	terminal io.Writer  // nil: the line is not shown
	start    time.Time
	task     string // such as "checking shard_0.db, 1 of 4"
	done     string // of the task, such as ", 10 blobs"
}

// showProgress shows the progress on stderr until it is hidden. Other output first clears the line.
func (cli *call) showProgress() {
	p := &cli.progress
	p.terminal = cli.stderr
	p.start = time.Now()
	p.task = "starting"
	cli.stdout = &clearingWriter{p, cli.stdout}
	cli.stderr = &clearingWriter{p, cli.stderr}
	time.AfterFunc(drawInterval, p.draw)
}

// startTask shows a task with a file, which is the first, second and so on of count.
func (p *progress) startTask(task, file string, position, count int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.task = fmt.Sprintf("%s %s, %d of %d", task, file, position, count)
	p.done = ""
}

func (p *progress) setDone(done string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.done = ", " + done
}

// draw draws the line, and again after each drawInterval until the line is hidden.
func (p *progress) draw() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.terminal == nil {
		return
	}
	seconds := time.Since(p.start).Seconds()
	fmt.Fprintf(p.terminal, clearLine+"%s%s, %.0f s", p.task, p.done, seconds)
	time.AfterFunc(drawInterval, p.draw)
}

func (p *progress) hide() {
	p.mu.Lock()
	defer p.mu.Unlock()
	io.WriteString(p.terminal, clearLine)
	p.terminal = nil
}

// clearingWriter is output that first clears the line of the progress.
type clearingWriter struct {
	progress *progress
	output   io.Writer
}

func (w *clearingWriter) Write(data []byte) (int, error) {
	w.progress.mu.Lock()
	defer w.progress.mu.Unlock()
	if w.progress.terminal != nil {
		io.WriteString(w.progress.terminal, clearLine)
	}
	return w.output.Write(data)
}

// ==== Configuration ==============================================================================
// One table lists the keys, with the check for each value. A value comes from the environment, else
// from the file, else from the defaults. All problems are reported together, before anything is
// opened or created.

//go:embed config.toml.example
var exampleConfig string

// config is the effective configuration. It is immutable after loadConfig. config.toml.example
// explains each key.
type config struct {
	DataDir            string // directory of the shard databases
	NumShards          int64
	StorageCompression bool
	OutputCompression  bool
	AsyncWrite         bool   // answer 202 once a write is queued
	BatchSize          int64  // most operations in one transaction
	BatchTimeoutMS     int64  // longest wait for more operations, in milliseconds
	Addr               string // listen address
	Durability         string // full, normal or off
	Hash               string // a key of hashes
	MaxBlobBytes       int64  // 0: no limit
	MaxPendingBytes    int64  // queued writes in memory, over all shards
	AuthToken          string // empty: everybody may do everything
	AuthTokenFile      string // file that AuthToken is read from
	ReadToken          string // opens reads only; empty: there is none
	ReadTokenFile      string // file that ReadToken is read from
	PublicRead         bool   // blobs can be read without a token
	TLSCert            string // PEM file
	TLSKey             string // PEM file
	CORSOrigin         string // whose pages may use the server from a browser
	CacheControl       string // header of answers that carry a blob
	LogFormat          string // text or json
	LogLevel           string // debug, info, warn or error
}

func newConfig() *config {
	return &config{
		BatchSize:       1,
		Addr:            "0.0.0.0:3000",
		Durability:      "full",
		Hash:            "fnv1a",
		MaxBlobBytes:    1 << 30,
		MaxPendingBytes: 64 << 20,
		LogFormat:       "text",
		LogLevel:        "info",
	}
}

// setting is one key of the configuration.
type setting struct {
	key   string
	field any // *string, *int64 or *bool: where the value goes

	// check returns "" if the value is right, else what it must be. nil accepts every value.
	check func(value any) string
}

// settings is the table of all keys, for the fields of cfg. data_dir and num_shards are required.
func (cfg *config) settings() []setting {
	return []setting{
		{"data_dir", &cfg.DataDir, matching(`^[^\x00]+$`, "the name of a directory")},
		{"num_shards", &cfg.NumShards, between(1, maxShards)},
		{"storage_compression", &cfg.StorageCompression, nil},
		{"output_compression", &cfg.OutputCompression, nil},
		{"async_write", &cfg.AsyncWrite, nil},
		{"batch_size", &cfg.BatchSize, atLeast(1)},
		{"batch_timeout_ms", &cfg.BatchTimeoutMS, atLeast(0)},
		{"addr", &cfg.Addr, hostPort},
		{"durability", &cfg.Durability, oneOf("full", "normal", "off")},
		{"hash", &cfg.Hash, oneOf("fnv1a", "crc32c", "sha256")},
		{"max_blob_bytes", &cfg.MaxBlobBytes, atLeast(0)},
		{"max_pending_bytes", &cfg.MaxPendingBytes, atLeast(1)},
		{"auth_token", &cfg.AuthToken, visibleWord},
		{"auth_token_file", &cfg.AuthTokenFile, nil},
		{"read_token", &cfg.ReadToken, visibleWord},
		{"read_token_file", &cfg.ReadTokenFile, nil},
		{"public_read", &cfg.PublicRead, nil},
		{"tls_cert", &cfg.TLSCert, nil},
		{"tls_key", &cfg.TLSKey, nil},
		{"cors_origin", &cfg.CORSOrigin, webOrigin},
		{"cache_control", &cfg.CacheControl, matching("^[ -~]*$", "visible ASCII")},
		{"log_format", &cfg.LogFormat, oneOf("text", "json")},
		{"log_level", &cfg.LogLevel, oneOf("debug", "info", "warn", "error")},
	}
}

// variable returns the name of the environment variable for s.
func (s setting) variable() string { return "BLOBNOM_" + strings.ToUpper(s.key) }

// The checks of the table. A value has the type of its field.

func between(minimum, maximum int64) func(any) string {
	return func(value any) string {
		if n := value.(int64); n < minimum || n > maximum {
			return fmt.Sprintf("a number from %d to %d", minimum, maximum)
		}
		return ""
	}
}

func atLeast(minimum int64) func(any) string {
	return func(value any) string {
		if value.(int64) < minimum {
			return fmt.Sprintf("a number, %d or more", minimum)
		}
		return ""
	}
}

func oneOf(words ...string) func(any) string {
	return func(value any) string {
		if !slices.Contains(words, value.(string)) {
			return "one of " + strings.Join(words, ", ")
		}
		return ""
	}
}

func matching(pattern, form string) func(any) string {
	return func(value any) string {
		if !regexp.MustCompile(pattern).MatchString(value.(string)) {
			return form
		}
		return ""
	}
}

// visibleWord accepts what can be a token in a header.
var visibleWord = matching("^[!-~]*$", "visible ASCII without spaces")

func hostPort(value any) string {
	_, port, err := net.SplitHostPort(value.(string))
	if err == nil {
		_, err = strconv.ParseUint(port, 10, 16)
	}
	if err != nil {
		return `HOST:PORT, such as "127.0.0.1:3000"`
	}
	return ""
}

func webOrigin(value any) string {
	origin := value.(string)
	if origin == "" || origin == "*" {
		return ""
	}
	if http.NewCrossOriginProtection().AddTrustedOrigin(origin) != nil {
		return `an origin such as "https://example.org", or "*"`
	}
	return ""
}

// parse converts a text of the environment to the field's type. If it cannot, it returns the text,
// which set then refuses.
func (s setting) parse(text string) any {
	switch s.field.(type) {
	case *int64:
		// The base 0 reads 1_000_000 and 0x10, as TOML does. It takes 010 for 8.
		if value, err := strconv.ParseInt(text, 0, 64); err == nil {
			return value
		}
	case *bool:
		if value, err := strconv.ParseBool(text); err == nil {
			return value
		}
	}
	return text
}

// set stores a value in the field and checks it. It returns "" if the value is right, else what it
// must be.
func (s setting) set(value any) string {
	isRightType := false
	expected := ""
	switch field := s.field.(type) {
	case *string:
		*field, isRightType = value.(string)
		expected = "text in quotes"
	case *int64:
		*field, isRightType = value.(int64)
		expected = "a whole number"
	case *bool:
		*field, isRightType = value.(bool)
		expected = "true or false"
	}
	if !isRightType {
		return expected
	}
	if s.check == nil {
		return ""
	}
	return s.check(value)
}

// problems collects what is wrong with a configuration.
type problems []string

func (p *problems) add(format string, args ...any) {
	*p = append(*p, fmt.Sprintf(format, args...))
}

// find returns the value of s in the environment or else among the values of the file, and the
// name of the variable or key that has it. The value is nil if there is none.
func (s setting) find(environ []string, values map[string]any) (any, string) {
	for _, entry := range environ {
		if text, ok := strings.CutPrefix(entry, s.variable()+"="); ok {
			return s.parse(text), s.variable()
		}
	}
	return values[s.key], s.key
}

// loadConfig reads the configuration and says where it came from. file may be empty: config.toml
// if there is one, else the embedded example. Every error is a usageError with all problems.
func loadConfig(file string, environ []string) (*config, string, error) {
	var found problems
	values, origin, readErr := readConfigFile(file)
	if readErr != nil {
		found.add("%v", readErr)
	}
	cfg := newConfig()
	for _, s := range cfg.settings() {
		value, name := s.find(environ, values)
		delete(values, s.key)
		if value == nil {
			isRequired := s.key == "data_dir" || s.key == "num_shards"
			if isRequired && readErr == nil {
				found.add("%s: is required and missing", name)
			}
			continue
		}
		isVariable := name == s.variable()
		if isVariable && value == "" && strings.Contains(s.key, "_token") {
			// An unset variable of a compose file arrives empty. It must not open the server.
			found.add("%s: is set but empty; give it a value or unset it", name)
			continue
		}
		expected := s.set(value)
		if expected == "" {
			continue
		}
		if s.key == "auth_token" || s.key == "read_token" {
			value = "(secret)"
		}
		found.add("%s = %#v: must be %s", name, value, expected)
	}
	for _, key := range slices.Sorted(maps.Keys(values)) {
		// The value is not shown: the key may be a misspelt auth_token.
		found.add("%s: unknown key", key)
	}
	// The files are read here and never again: a new token needs a restart.
	found.readToken("auth_token", &cfg.AuthToken, cfg.AuthTokenFile)
	found.readToken("read_token", &cfg.ReadToken, cfg.ReadTokenFile)
	cfg.checkTogether(&found)
	if len(found) > 0 {
		text := strings.Join(found, "; ")
		return nil, origin, usageError("wrong configuration (" + origin + "): " + text)
	}
	return cfg, origin, nil
}

// readConfigFile returns the values in the file of loadConfig, and where they came from.
func readConfigFile(file string) (values map[string]any, origin string, err error) {
	if file == "" && fileExists("config.toml") {
		file = "config.toml"
	}
	origin = "built-in config.toml.example"
	text := exampleConfig
	if file != "" {
		origin = file
		data, err := os.ReadFile(file)
		if err != nil {
			return nil, origin, fmt.Errorf("cannot read it: %w", err)
		}
		text = string(data)
	}
	_, err = toml.Decode(text, &values)
	if syntax, ok := errors.AsType[toml.ParseError](err); ok {
		// The text of the error is not shown: it quotes the file, perhaps a token.
		const problem = "not valid TOML: line %d cannot be parsed, after the key %q: " +
			"is it a text without quotes, a key for the second time, or a number that is too large?"
		err = fmt.Errorf(problem, syntax.Position.Line, syntax.LastKey)
	}
	return values, origin, err
}

// readToken sets the token of key to the content of file, if there is a file. White space around
// the token does not count.
func (p *problems) readToken(key string, token *string, file string) {
	if file == "" {
		return
	}
	if *token != "" {
		p.add("%s and %[1]s_file are both given; keep one", key)
		return
	}
	data, err := os.ReadFile(file)
	*token = strings.TrimSpace(string(data))
	if err == nil && (*token == "" || visibleWord(*token) != "") {
		err = errors.New("it is empty, or not visible ASCII without spaces")
	}
	if err != nil {
		p.add("%s_file = %q: must be a file with a token: %v", key, file, err)
	}
}

// checkTogether checks the values that depend on each other.
func (cfg *config) checkTogether(found *problems) {
	if cfg.ReadToken != "" && cfg.AuthToken == "" && cfg.AuthTokenFile == "" {
		found.add("read_token: needs auth_token; without that everybody may read and write")
	}
	if cfg.ReadToken != "" && cfg.ReadToken == cfg.AuthToken {
		found.add("read_token: must differ from auth_token")
	}
	if cfg.TLSCert == "" && cfg.TLSKey == "" {
		return
	}
	if _, err := tls.LoadX509KeyPair(cfg.TLSCert, cfg.TLSKey); err != nil {
		const problem = "tls_key = %q: must be set together with tls_cert, and be its key: %v"
		found.add(problem, cfg.TLSKey, err)
	}
}

// ==== HTTP server ================================================================================
// Routes, what every handler runs under, and the one place where an error becomes a status.
// Each request has its own goroutine. Nothing here holds a lock or a database connection while it
// waits for a client. The chapter Transport has the connection and its deadlines.

// server is the HTTP face of a store. It has no storage logic.
type server struct {
	store   *store
	log     *slog.Logger
	cfg     *config
	metrics *metrics
	mux     *http.ServeMux
	foreign *http.CrossOriginProtection // refuses writes of foreign pages; nil if cors_origin is *

	pairMu    sync.Mutex       // guards the next two
	pair      *tls.Certificate // the last that could be read, nil before the first
	pairError string           // why the files cannot be read now, "" if they can
}

func newServer(cfg *config, st *store, logger *slog.Logger) *server {
	s := &server{
		store:   st,
		log:     logger,
		cfg:     cfg,
		metrics: newMetrics(),
		mux:     http.NewServeMux(),
	}
	if cfg.CORSOrigin != "*" {
		s.foreign = http.NewCrossOriginProtection()
		s.foreign.AddTrustedOrigin(cfg.CORSOrigin) // an empty origin is an error, and trusts nobody
	}
	s.handle("GET /blob/{key...}", s.getBlob)
	s.handle("PUT /blob/{key...}", s.putBlob)
	s.handle("POST /blob/{key...}", s.putBlob)
	s.handle("DELETE /blob/{key...}", s.deleteBlob)
	s.handle("/blob/{key...}", refuseMethod)
	s.handleGet("/blob", s.blobRoot) // else the mux redirects it to /blob/
	s.handleGet("/{$}", s.about)
	s.handleGet("/healthz", healthz)
	s.handleGet("/readyz", s.readyz)
	s.handleGet("/metrics", s.exposeMetrics)
	s.handle("/", unknownPath)
	return s
}

// handle makes h answer the requests that match pattern.
func (s *server) handle(pattern string, h handler) {
	s.mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
		s.answer(w, r, h)
	})
}

// handleGet makes h answer GET and HEAD of a path, and refuses query parameters.
func (s *server) handleGet(urlPath string, h handler) {
	s.handle("GET "+urlPath, func(w *response, r *http.Request) error {
		if _, err := queryOf(r); err != nil {
			return err
		}
		return h(w, r)
	})
	s.handle(urlPath, refuseMethod)
}

func healthz(w *response, _ *http.Request) error {
	return writeText(w, http.StatusOK, "ok\n")
}

func unknownPath(*response, *http.Request) error { return errNoRoute }

// methodsOf returns the methods that the path of r serves.
func methodsOf(r *http.Request) string {
	if strings.HasPrefix(r.URL.Path, "/blob/") {
		return blobMethods
	}
	return "GET, HEAD"
}

func refuseMethod(w *response, r *http.Request) error {
	w.Header().Set("Allow", methodsOf(r))
	return newError(http.StatusMethodNotAllowed, "method not allowed: allowed are "+methodsOf(r))
}

// answerOptions answers OPTIONS. A load balancer may use it as its health check. A browser asks
// what a page of another origin may do. Without cors_origin the answer does not name the origin,
// and so allows the page nothing.
func (s *server) answerOptions(w *response, r *http.Request) error {
	header := w.Header()
	header.Set("Allow", methodsOf(r))
	if s.cfg.CORSOrigin != "" {
		asked := r.Header.Get("Access-Control-Request-Headers")
		header.Set("Access-Control-Allow-Methods", blobMethods)
		header.Set("Access-Control-Allow-Headers", asked)
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

// exposedHeaders are the headers of answers that a script of cors_origin may read.
const exposedHeaders = "Accept-Ranges, Allow, Blob-Created, Blob-Expires, Blob-Updated, " +
	"Blob-Version, Cache-Control, Content-Encoding, Content-Length, Content-Range, " +
	"Content-Security-Policy, Content-Type, Date, Etag, Last-Modified, Repr-Digest, " +
	"Retry-After, Vary, WWW-Authenticate, X-Content-Type-Options"

// ServeHTTP sets the headers of cors_origin, answers OPTIONS, and gives the rest to the mux with a
// cleaned path.
func (s *server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if s.cfg.CORSOrigin != "" {
		w.Header().Set("Access-Control-Allow-Origin", s.cfg.CORSOrigin)
		w.Header().Set("Access-Control-Expose-Headers", exposedHeaders)
	}
	err := cleanPath(r.URL)
	switch {
	case r.Method == http.MethodOptions:
		s.answer(w, r, s.answerOptions)
	case err != nil:
		s.answer(w, r, func(*response, *http.Request) error { return err })
	default:
		s.mux.ServeHTTP(w, r)
	}
}

// cleanPath resolves the dot segments that the client has not percent-encoded. The mux redirects a
// path with empty or dot segments, and so would turn the key a//b into a/b. Therefore cleanPath
// then encodes all that follows /blob/, or in another path the first slash, as one segment.
//   - /blob/x/../a//b becomes /blob/a%2F%2Fb, the key "a//b"
//   - /blob/../x is an error
//   - /x/../healthz becomes /healthz, and /x//y becomes /x%2F%2Fy, which no route has
func cleanPath(u *url.URL) error {
	if u.Path == "" { // GET http://host HTTP/1.1
		u.Path = "/"
	}
	sent := u.EscapedPath()
	if path.Clean(sent) == sent { // nearly always: the mux does not redirect it either
		return nil
	}
	// ResolveReference does what RFC 3986 5.2.4 says, even against an empty URL.
	reference := &url.URL{Path: u.Path, RawPath: u.RawPath}
	resolved := new(url.URL).ResolveReference(reference)
	wasBlob := strings.HasPrefix(sent, "/blob/")
	isBlob := strings.HasPrefix(resolved.Path, "/blob/")
	if wasBlob && !isBlob {
		return badRequest(`the path leads out of /blob/; percent-encode a ".." of the key`)
	}
	prefix := "/"
	if isBlob {
		prefix = "/blob/"
	}
	u.Path = resolved.Path
	u.RawPath = prefix + escapeAll(strings.TrimPrefix(resolved.Path, prefix))
	return nil
}

// escapeAll encodes a key as one path segment that neither a client nor the mux resolves.
func escapeAll(key string) string { return strings.ReplaceAll(url.PathEscape(key), ".", "%2E") }

// handler answers one request, or returns an error, which server.answer answers.
type handler func(w *response, r *http.Request) error

// response records what was answered. Only the goroutine of its request may use it.
type response struct {
	http.ResponseWriter
	status         int       // 0: nothing was answered, or the answer was cut off
	received, sent int64     // bytes of bodies
	renewed        time.Time // when the deadlines were last moved: see renewDeadlines
}

func (w *response) WriteHeader(status int) {
	if w.status == 0 && status >= 200 {
		w.renewDeadlines() // the client has the full time, however long the handler took
		w.status = status
	}
	w.ResponseWriter.WriteHeader(status)
}

// Write sends p. An error is an errClientGone.
func (w *response) Write(p []byte) (n int, err error) {
	if w.status == 0 {
		w.WriteHeader(http.StatusOK)
	}
	for piece := range slices.Chunk(p, pieceBytes) {
		w.renewDeadlines()
		written, err := w.ResponseWriter.Write(piece)
		n += written
		w.sent += int64(written)
		if err != nil {
			return n, fmt.Errorf("%w: %w", errClientGone, err)
		}
	}
	return n, nil
}

// requestBody is the body of a request. It ends with an error if it is longer than the limit, or if
// the client is gone. A body that is announced as too large ends at once.
type requestBody struct {
	request *http.Request
	w       *response
	limit   int64 // bytes
}

func (b *requestBody) Read(p []byte) (n int, err error) {
	isTooLarge := b.request.ContentLength > b.limit
	if !isTooLarge {
		b.w.renewDeadlines() // the client has the full time, however long the last commit took
		n, err = b.request.Body.Read(p[:min(len(p), pieceBytes)])
		b.w.received += int64(n)
		isTooLarge = b.w.received > b.limit
	}
	if isTooLarge {
		return n, fmt.Errorf("%w: max_blob_bytes is %d", errTooLarge, b.limit)
	}
	if err != nil && err != io.EOF {
		return n, fmt.Errorf("%w: %w", errClientGone, err)
	}
	return n, err
}

// answer runs h if r is authorized, turns an error into an answer, and counts and logs the request.
func (s *server) answer(rw http.ResponseWriter, r *http.Request, h handler) {
	start := time.Now()
	w := &response{ResponseWriter: rw, renewed: start}
	// Browsers must not guess another type.
	w.Header()["X-Content-Type-Options"] = []string{"nosniff"}
	err := s.authorize(r)
	if err == nil {
		err = h(w, r)
	}
	isWhole := true
	if err != nil {
		isWhole = answerError(w, r, err)
	}
	if !isWhole {
		w.status = 0
	}
	took := time.Since(start)
	s.metrics.observe(w, r, took)
	s.logRequest(w, r, err, took)
	if !isWhole {
		// This cuts the connection: half an answer must not pass for a whole one.
		panic(http.ErrAbortHandler)
	}
	if err != nil {
		w.discardBody(r)
	}
}

// answerError answers err. It returns false if the answer has begun or nobody reads it.
func answerError(w *response, r *http.Request, err error) bool {
	if w.status != 0 || errors.Is(err, errClientGone) {
		return false
	}
	status, text := statusOf(err)
	maps.DeleteFunc(w.Header(), func(name string, _ []string) bool {
		return !belongsToError(name, status)
	})
	switch status {
	case http.StatusUnauthorized:
		basic := `Basic realm="blobnom", charset="UTF-8"`
		w.Header()["Www-Authenticate"] = []string{"Bearer", basic}
	case http.StatusServiceUnavailable:
		w.Header().Set("Retry-After", "1")
	}
	if r.ProtoMajor == 1 {
		// Else net/http reads up to 256 KiB of the request's body before it sends the answer.
		http.NewResponseController(w.ResponseWriter).EnableFullDuplex()
	}
	return writeText(w, status, text+"\n") == nil
}

// belongsToError reports whether a header that was set before the error stays in its answer. The
// other headers describe a blob.
func belongsToError(header string, status int) bool {
	switch header {
	case "Allow", "Vary", "X-Content-Type-Options":
		return true
	case "Content-Range":
		return status == http.StatusRequestedRangeNotSatisfiable
	}
	return strings.HasPrefix(header, "Access-Control-")
}

// logRequest writes the line of a request, without its query, which may have a signature. Its level
// is Error if the server is to blame, else Debug.
func (s *server) logRequest(w *response, r *http.Request, err error, took time.Duration) {
	level := slog.LevelDebug
	if s.isOurFault(err) {
		level = slog.LevelError
	}
	if !s.log.Enabled(r.Context(), level) { // saves the time to collect the arguments
		return
	}
	args := []any{
		"method", r.Method,
		"path", r.URL.EscapedPath(),
		"status", w.status,
		"bytes_in", w.received,
		"bytes_out", w.sent,
		"duration_ms", float64(took.Microseconds()) / 1e3,
		"client", r.RemoteAddr,
	}
	if err != nil {
		args = append(args, "error", err)
	}
	s.log.Log(r.Context(), level, "request", args...)
}

// isOurFault reports whether the log has to say why a request failed. The reserve has logged once,
// for all requests, that the disk is full.
func (s *server) isOurFault(err error) bool {
	if err == nil || errors.Is(err, errClientGone) {
		return false
	}
	if errors.Is(err, errFull) && s.store.reserve.isDiskFull() {
		return false
	}
	status, _ := statusOf(err)
	return status >= 500
}

func writeText(w *response, status int, text string) error {
	return writeBody(w, status, "text/plain; charset=utf-8", []byte(text))
}

func writeJSON(w *response, status int, v any) error {
	text, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return writeBody(w, status, "application/json", append(text, '\n'))
}

func writeBody(w *response, status int, contentType string, body []byte) error {
	w.Header().Set("Content-Type", contentType)
	w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	w.WriteHeader(status)
	_, err := w.Write(body)
	return err
}

// serve answers requests on listener until ctx ends or it fails. Then it stops accepting, gives
// running requests drainTimeout, and cuts off the rest: what their handlers still ask of the store
// fails.
func (s *server) serve(ctx context.Context, listener net.Listener) error {
	httpServer := &http.Server{
		Handler:           s,
		MaxHeaderBytes:    64 << 10, // bounds a connection's memory; a key takes 3 KiB at most
		ErrorLog:          log.New(serverLog{s.log}, "", 0),
		ReadHeaderTimeout: 15 * time.Second,
		IdleTimeout:       120 * time.Second,
		ReadTimeout:       stallTimeout, // renewDeadlines moves this deadline and the next
		WriteTimeout:      takeTimeout,
		HTTP2:             &http.HTTP2Config{WriteByteTimeout: takeTimeout},
		TLSConfig:         &tls.Config{GetCertificate: s.certificate},
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			return context.WithValue(ctx, connKey{}, c)
		},
	}
	failed := make(chan error, 1)
	go func() {
		if s.cfg.TLSCert != "" {
			failed <- httpServer.ServeTLS(listener, "", "")
			return
		}
		failed <- httpServer.Serve(corkedListener{listener})
	}()
	var err error
	select {
	case err = <-failed:
	case <-ctx.Done():
	}
	// Before Shutdown, which waits for the handlers: what waits in the store gives up or hurries.
	s.store.stop()
	s.log.Info("stopping: finishing requests and committing what is queued")
	drainCtx, cancel := context.WithTimeout(context.Background(), drainTimeout)
	defer cancel()
	if httpServer.Shutdown(drainCtx) != nil {
		s.log.Warn("requests cut off", "after", drainTimeout)
		httpServer.Close()
	}
	return err
}

// ==== Handlers ===================================================================================
// One function per request. A handler checks the request, asks the store and describes the result
// in headers. Whatever is not a success is an error, which server.answer answers.

// etags returns the entity tags of b's content, as it is and as gzip. A client may send either.
func (b *blob) etags() (plain, zipped string) {
	sum := hex.EncodeToString(b.sum[:])
	return `"` + sum + `"`, `"` + sum + `-gzip"`
}

// stamp formats a time for answers; 0 gives the empty string.
func stamp(ms int64) string {
	if ms == 0 {
		return ""
	}
	return time.UnixMilli(ms).UTC().Format("2006-01-02T15:04:05.000Z07:00")
}

// headerNames are the headers of a blob that is sent as it is, in the order of blob.header.
var headerNames = [...]string{
	"Content-Type",
	"Content-Length",
	"Etag",
	"Repr-Digest",
	"Last-Modified",
	"Accept-Ranges",
	"Blob-Created",
	"Blob-Updated",
	"Blob-Version",
	"Blob-Expires",
}

// renderHeader fills in b.header, once for all answers. Rendering it for each makes a cached GET
// take 26 µs instead of 19, and a map per blob makes garbage collections a third longer.
func (b *blob) renderHeader() {
	etag, _ := b.etags()
	b.header = [...]string{
		b.contentType,
		strconv.FormatInt(b.size, 10),
		etag,
		"sha-256=:" + base64.StdEncoding.EncodeToString(b.sum[:]) + ":",
		time.UnixMilli(b.updated).UTC().Format(http.TimeFormat),
		"bytes",
		stamp(b.created),
		stamp(b.updated),
		strconv.FormatInt(b.version, 10),
		stamp(b.expires),
	}
}

// getBlob serves GET and HEAD of a key, and the listing.
func (s *server) getBlob(w *response, r *http.Request) error {
	key := r.PathValue("key")
	if key == "" { // a route of its own, /blob/{$}, would also take /blob/%2F, the key "/"
		return s.listBlobs(w, r)
	}
	if isSigned(r) { // other reads ignore their query, such as ?v=2 of a page's link
		if _, err := queryOf(r, "expires", "sig"); err != nil {
			return err
		}
	}
	sh, err := s.store.shardOf(key)
	if err != nil {
		return err
	}
	reader, err := sh.read(key, r.Method == http.MethodHead)
	if errors.Is(err, errNoBlob) {
		return s.answerMissing(w, r, key)
	}
	if err != nil {
		return err
	}
	defer reader.close()
	return s.serveBlob(w, r, reader)
}

// serveBlob answers with a blob. http.ServeContent decides about conditions and ranges; a GET
// without them does not need it.
func (s *server) serveBlob(w *response, r *http.Request, reader *blobReader) error {
	// A connection of TLS cannot be corked. A larger blob would take memory.
	conn, isCorkable := r.Context().Value(connKey{}).(*corkedConn)
	isCorked := isCorkable && reader.blob.size <= cacheItem
	if isCorked {
		conn.cork() // header and content leave with one system call: see corkedConn
		defer conn.uncork()
	}
	normalizeRange(r, reader.blob.size)
	s.describe(w, r, reader.blob)
	s.negotiate(w, r, reader)
	send := serveContent
	if isPlainGet(r) {
		send = sendWhole
	}
	err := send(w, r, reader)
	if err == nil && isCorked {
		// net/http's buffer goes into the cork. This cannot fail: uncork sends it.
		http.NewResponseController(w.ResponseWriter).Flush()
	}
	return err
}

// sendWhole answers with a whole blob, chunk by chunk.
func sendWhole(w *response, _ *http.Request, reader *blobReader) error {
	if err := reader.load(); err != nil { // before the header, so that it can still be an error
		return err
	}
	_, err := reader.WriteTo(w)
	return err
}

// isPlainGet reports whether r is a GET without a condition or range.
func isPlainGet(r *http.Request) bool {
	for _, name := range []string{
		"Range", "If-Match", "If-None-Match", "If-Modified-Since", "If-Unmodified-Since",
	} {
		if len(r.Header[name]) > 0 {
			return false
		}
	}
	return r.Method == http.MethodGet
}

// normalizeRange edits the Range of r before http.ServeContent reads it. It removes the header, so
// that the whole blob is sent, if
//   - it has several ranges, or another unit than bytes
//   - its condition, If-Range, is a date, because two writes may have the same date, or a weak tag,
//     which matches nothing
//   - the blob is empty: ServeContent answers its ranges wrongly
//
// The range bytes=-0, the last 0 bytes, is to be answered 416. ServeContent does that for a range
// that begins behind the end.
func normalizeRange(r *http.Request, size int64) {
	ranges := r.Header.Get("Range")
	isOne := strings.HasPrefix(ranges, "bytes=") && !strings.Contains(ranges, ",")
	condition := r.Header.Get("If-Range")
	mayMatch := condition == "" || condition[0] == '"'
	if !isOne || !mayMatch || size == 0 {
		delete(r.Header, "Range")
		return
	}
	isLastZero := strings.TrimRight(ranges, "0") == "bytes=-"
	if isLastZero {
		r.Header.Set("Range", fmt.Sprintf("bytes=%d-", size))
	}
}

// blobPolicy lets no script of a stored page run. A stored video that is opened by its URL plays,
// and links and downloads of a stored report work.
const blobPolicy = "sandbox allow-same-origin allow-downloads allow-popups"

// describe sets the headers of an answer with b as it is.
func (s *server) describe(w *response, r *http.Request, b *blob) {
	header := w.Header()
	for i, name := range headerNames {
		if b.header[i] != "" {
			header[name] = b.header[i : i+1 : i+1] // without allocating
		}
	}
	header["Content-Security-Policy"] = []string{blobPolicy}
	if b.updated > s.store.now().UnixMilli() { // the clock went back
		header.Set("Last-Modified", s.store.now().UTC().Format(http.TimeFormat))
	}
	if cacheControl := s.cacheControl(r, b); cacheControl != "" {
		header.Set("Cache-Control", cacheControl)
	}
}

// negotiate decides whether the reader sends its blob as gzip, and changes the headers for that.
func (s *server) negotiate(w *response, r *http.Request, reader *blobReader) {
	header := w.Header()
	b := reader.blob
	if !s.cfg.OutputCompression || !b.isCompressible() {
		return
	}
	header.Set("Vary", "Accept-Encoding") // even if this client gets it uncompressed
	isRange := len(r.Header["Range"]) > 0
	if isRange || !acceptsGzip(r.Header) {
		return
	}
	reader.zipped = true
	_, etag := b.etags()
	header.Set("Etag", etag)
	header.Set("Content-Encoding", "gzip")
	header.Del("Repr-Digest") // the digest is of the content as it is
	header.Del("Content-Length")
	if b.deflated {
		header.Set("Content-Length", strconv.FormatInt(b.stored+gzipOverhead, 10))
	}
}

var maxAge = regexp.MustCompile(`(?i)\b(s-maxage|max-age)="?\d+"?`)

// cacheControl returns the Cache-Control of an answer with b. Caches must not keep the answer to a
// signed URL, nor keep a blob beyond its expiry.
func (s *server) cacheControl(r *http.Request, b *blob) string {
	if isSigned(r) {
		return "private, no-store"
	}
	configured := s.cfg.CacheControl
	if configured == "" || b.expires == 0 {
		return configured
	}
	left := max(0, b.expires-s.store.now().UnixMilli()) / 1000
	return maxAge.ReplaceAllStringFunc(configured, func(directive string) string {
		name, value, _ := strings.Cut(directive, "=")
		// Of a number that is too large ParseInt returns the largest.
		seconds, _ := strconv.ParseInt(strings.Trim(value, `"`), 10, 64)
		return fmt.Sprintf("%s=%d", name, min(seconds, left))
	})
}

// serveContent answers r by http.ServeContent, which compares the tags in the request with the one
// in the answer's header. A content has two tags, as it is and as gzip, and a client may send
// either. So serveContent first replaces both of them in the request by the one of the answer.
func serveContent(w *response, r *http.Request, reader *blobReader) error {
	plain, zipped := reader.blob.etags()
	answered := w.Header().Get("Etag")
	for _, name := range []string{"If-Match", "If-None-Match"} {
		list := strings.Join(r.Header[name], ",")
		if list != "" {
			list = strings.ReplaceAll(list, plain, answered)
			list = strings.ReplaceAll(list, zipped, answered)
			r.Header.Set(name, list)
		}
	}
	modified, _ := http.ParseTime(w.Header().Get("Last-Modified"))
	content := &contentWriter{response: w, reader: reader, isHead: r.Method == http.MethodHead}
	http.ServeContent(content, r, "", modified, reader)
	if errors.Is(content.err, errRange) { // ServeContent sets no header for a malformed range
		w.Header().Set("Content-Range", fmt.Sprintf("bytes */%d", reader.blob.size))
	}
	return content.err
}

// contentWriter is what http.ServeContent writes to. ServeContent drops the errors of reading and
// of writing, and answers errors itself. contentWriter keeps the first error and sends nothing
// after it.
type contentWriter struct {
	response *response
	reader   *blobReader
	isHead   bool
	err      error
}

func (w *contentWriter) Header() http.Header { return w.response.Header() }

// WriteHeader loads the first chunk before the header is sent, so that a failure can still be
// answered as an error.
func (w *contentWriter) WriteHeader(status int) {
	switch {
	case status == http.StatusPreconditionFailed:
		const text = "If-Match or If-Unmodified-Since does not hold for this blob"
		w.err = fmt.Errorf("%w: %s", errCondition, text)
	case status == http.StatusRequestedRangeNotSatisfiable:
		w.err = errRange
	case status < 300 && !w.isHead: // the others have no content
		w.err = w.reader.load()
	}
	if w.err == nil {
		w.response.WriteHeader(status)
	}
}

// ReadFrom sends content. ServeContent calls it, by io.CopyN.
func (w *contentWriter) ReadFrom(content io.Reader) (n int64, err error) {
	if w.err == nil {
		n, w.err = io.Copy(w.response, content)
	}
	return n, w.err
}

func (w *contentWriter) Write(p []byte) (int, error) {
	n, err := w.ReadFrom(bytes.NewReader(p))
	return int(n), err
}

func (s *server) putBlob(w *response, r *http.Request) error {
	key := r.PathValue("key")
	sh, err := s.store.shardOf(key)
	if err != nil {
		return err
	}
	contentType, err := contentTypeOf(r)
	if err != nil {
		return err
	}
	ttl, err := ttlOf(r)
	if err != nil {
		return err
	}
	cond, err := conditionsOf(r.Header)
	if err != nil {
		return err
	}
	check, err := bodyCheckOf(r)
	if err != nil {
		return err
	}
	body := &requestBody{request: r, w: w, limit: s.store.maxBlob}
	b, isQueued, err := sh.put(key, check.tee(body), &putOptions{
		contentType: contentType,
		length:      r.ContentLength,
		ttl:         ttl,
		conditions:  cond,
		verify:      check.verify,
	})
	if err != nil {
		return err
	}
	etag, _ := b.etags()
	w.Header()["Etag"] = []string{etag}
	if b.expires != 0 {
		w.Header().Set("Blob-Expires", stamp(b.expires))
	}
	return acknowledge(w, http.StatusCreated, isQueued)
}

// acknowledge answers a write: with status if it is committed, else with 202.
func acknowledge(w *response, status int, isQueued bool) error {
	if isQueued {
		status = http.StatusAccepted
	}
	w.WriteHeader(status)
	return nil
}

// deleteBlob serves DELETE. Only with a precondition does the answer tell whether the key existed.
func (s *server) deleteBlob(w *response, r *http.Request) error {
	key := r.PathValue("key")
	sh, err := s.store.shardOf(key)
	if err != nil {
		return err
	}
	if _, err := writeQueryOf(r); err != nil {
		return err
	}
	cond, err := conditionsOf(r.Header)
	if err != nil {
		return err
	}
	isQueued, err := sh.remove(key, cond)
	if err != nil {
		return err
	}
	return acknowledge(w, http.StatusNoContent, isQueued)
}

// listBlobs serves /blob/: the page of the top folder for a browser, else a page of the listing.
func (s *server) listBlobs(w *response, r *http.Request) error {
	r.Pattern = folderRoute // for the metrics
	w.Header().Set("Vary", "Accept")
	if wantsPage(r) {
		return s.showFolder(w, r, "")
	}
	asked, err := listingOf(r)
	if err != nil {
		return err
	}
	rows, more, err := s.store.list(asked)
	if err != nil {
		return err
	}
	var answer struct {
		Blobs    []listed `json:"blobs"`
		Prefixes []string `json:"prefixes,omitzero"` // nil without a delimiter
		Next     string   `json:"next,omitempty"`
	}
	answer.Blobs = []listed{} // an empty list is not null
	if asked.delimiter != "" {
		answer.Prefixes = []string{}
	}
	for _, row := range rows {
		if row.isFolder() {
			answer.Prefixes = append(answer.Prefixes, row.Key)
		} else {
			answer.Blobs = append(answer.Blobs, row)
		}
	}
	if more {
		answer.Next = rows[len(rows)-1].Key
	}
	return writeJSON(w, http.StatusOK, answer)
}

// listingOf returns the listing that the query of r asks for.
func listingOf(r *http.Request) (listing, error) {
	l := listing{limit: defaultPage}
	query, err := queryOf(r, "prefix", "after", "limit", "delimiter")
	if err != nil {
		return l, err
	}
	l.prefix = query.Get("prefix")
	l.after = query.Get("after")
	l.delimiter = query.Get("delimiter")
	if !utf8.ValidString(l.prefix + " " + l.after + " " + l.delimiter) {
		return l, badRequest("prefix, after and delimiter must be valid UTF-8")
	}
	if query.Has("limit") {
		limit, err := strconv.ParseUint(query.Get("limit"), 10, 31)
		if err != nil || limit < 1 || limit > maxPage {
			return l, badRequest("limit must be a number from 1 to %d", maxPage)
		}
		l.limit = int(limit)
	}
	return l, nil
}

// readyz asks every shard. The answer is public: it has the numbers of the shards and the kinds of
// their errors, not their paths.
func (s *server) readyz(w *response, _ *http.Request) error {
	status := http.StatusOK
	rows := []map[string]any{}
	for i, sh := range s.store.shards {
		err := sh.health()
		row := map[string]any{
			"shard":                    i,
			"ready":                    err == nil,
			"failed_background_writes": sh.failedWrites.Load(),
		}
		if err != nil {
			status = http.StatusServiceUnavailable
			_, row["error"] = statusOf(err)
		}
		rows = append(rows, row)
	}
	isReady := status == http.StatusOK
	return writeJSON(w, status, map[string]any{"ready": isReady, "shards": rows})
}

// ==== Pages ======================================================================================
// What a browser shows: the server itself, and folders to browse and to upload into. Tools such as
// wget -r can download everything through the folder pages. The pages work without JavaScript,
// except for uploads.

// wantsPage reports whether r accepts HTML and has no query. A query asks for a listing, or signs.
func wantsPage(r *http.Request) bool {
	accept := strings.Join(r.Header["Accept"], ",")
	return r.URL.RawQuery == "" && strings.Contains(accept, "text/html")
}

const aboutText = `Blobnom %s, a small sharded blob server

  curl --fail-with-body -T FILE %[2]sKEY    store or replace
  curl -f -o FILE %[2]sKEY                  fetch
  curl -f '%[2]s?prefix=P'                  list, a page at a time
  curl -f -X DELETE %[2]sKEY                delete

A KEY may have slashes. For operators: /healthz, /readyz, /metrics.
`

// about explains the server to whoever finds it.
func (s *server) about(w *response, r *http.Request) error {
	scheme := "http"
	if r.TLS != nil {
		scheme = "https"
	}
	text := fmt.Sprintf(aboutText, version(), scheme+"://"+r.Host+"/blob/")
	w.Header().Set("Vary", "Accept")
	if !wantsPage(r) {
		return writeText(w, http.StatusOK, text)
	}
	setPageHeaders(w)
	return pageTemplates.ExecuteTemplate(w, "about", text)
}

// blobRoot serves /blob, the path of the top folder without its slash.
func (s *server) blobRoot(w *response, r *http.Request) error {
	w.Header().Set("Vary", "Accept")
	if wantsPage(r) {
		return seeOther(w, "/blob/")
	}
	return errNoRoute
}

// answerMissing answers a GET of a key without a blob. A browser is shown the folder with that
// name, or redirected to it, if there are blobs in it. Other clients are told how to list the
// folder, even if it is empty: to look for it in each shard would make a 404 up to twenty times
// slower.
func (s *server) answerMissing(w *response, r *http.Request, key string) error {
	w.Header().Set("Vary", "Accept")
	folder := strings.TrimSuffix(key, "/") + "/"
	if wantsPage(r) {
		if key == folder {
			return s.showFolder(w, r, folder)
		}
		// With public_read, who has no token does not learn whether anything is below the key.
		mayList := s.authorizeFolder(r) == nil
		folderPath := pathOf(folder)
		if mayList && folderPath != "" && s.store.hasPrefix(folder) {
			return seeOther(w, "/blob/"+folderPath)
		}
	}
	prefix := strings.ReplaceAll(url.QueryEscape(folder), "%2F", "/")
	return fmt.Errorf("%w; keys below it are listed by /blob/?prefix=%s", errNoBlob, prefix)
}

// seeOther redirects a browser. The answer is not cached, because a blob may get the path that the
// browser asked for.
func seeOther(w *response, location string) error {
	w.Header().Set("Location", location)
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(http.StatusSeeOther)
	return nil
}

// folderRoute is the pattern of listings and folders for the metrics. The mux gives them the
// pattern of a key.
const folderRoute = "GET /blob/"

// showFolder answers a page of what is below folder, which is empty or ends with a slash.
func (s *server) showFolder(w *response, r *http.Request, folder string) error {
	r.Pattern = folderRoute // for the metrics
	if err := s.authorizeFolder(r); err != nil {
		return err
	}
	// Unlike hasPrefix this waits for queued writes, and fails if a shard is broken.
	rows, _, err := s.store.list(listing{prefix: folder, limit: 1})
	if err != nil {
		return err
	}
	if len(rows) == 0 && folder != "" {
		return errNoBlob
	}
	setPageHeaders(w)
	if r.Method == http.MethodHead {
		w.WriteHeader(http.StatusOK)
		return nil
	}
	return s.writeFolder(w, folder)
}

// writeFolder writes the page while it reads the shards: a folder of any size costs the memory of
// one page of the listing. It reads all rows twice, because the folders stand before the files.
func (s *server) writeFolder(w io.Writer, folder string) error {
	top := folderTop{Folder: "/" + folder, Crumbs: crumbsOf(folder), Script: uploadScript}
	if err := pageTemplates.ExecuteTemplate(w, "folder", top); err != nil {
		return err
	}
	folders, _, err := s.writeRows(w, folder, listed.isFolder)
	if err != nil {
		return err
	}
	files, size, err := s.writeRows(w, folder, listed.isFile)
	if err != nil {
		return err
	}
	const foot = "</table>\n<p>Folders: %d. Files: %d, %s.\n"
	_, err = fmt.Fprintf(w, foot, folders, files, humanSize(size))
	return err
}

// writeRows writes the rows of a folder that are wanted. It returns how many there are, and the sum
// of their sizes.
func (s *server) writeRows(w io.Writer, folder string, isWanted func(listed) bool) (
	count int, size int64, err error) {
	all := listing{prefix: folder, delimiter: "/", limit: defaultPage}
	for row, err := range s.store.rows(all) {
		if err != nil {
			return 0, 0, err
		}
		if !isWanted(row) {
			continue
		}
		count++
		size += row.Size
		row.Key = strings.TrimPrefix(row.Key, folder) // names and links are relative
		if err := pageTemplates.ExecuteTemplate(w, "row", row); err != nil {
			return 0, 0, err
		}
	}
	return count, size, nil
}

// folderTop is what stands above the rows of a folder page.
type folderTop struct {
	Folder string
	Crumbs []crumb
	Script template.JS
}

// crumb is one part of a folder's path. URL is relative, and empty for the folder itself.
type crumb struct{ Name, URL string }

// crumbsOf returns the parts of a folder's path, from the top folder down.
func crumbsOf(folder string) []crumb {
	parts := strings.SplitAfter("/"+folder, "/") // of "a/": "/", "a/" and ""
	parts = parts[:len(parts)-1]
	var crumbs []crumb
	for i, name := range parts {
		levels := len(parts) - 1 - i // up to it from the folder
		crumbs = append(crumbs, crumb{name, strings.Repeat("../", levels)})
	}
	return crumbs
}

// pathOf percent-encodes key for a URL, but not its slashes. It returns "" for a key with a dot
// segment: a browser would resolve the segment, encoded or not, and ask for another key.
func pathOf(key string) string {
	segments := strings.Split(key, "/")
	for i, segment := range segments {
		if segment == "." || segment == ".." {
			return ""
		}
		segments[i] = url.PathEscape(segment)
	}
	return strings.Join(segments, "/")
}

func setPageHeaders(w *response) {
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	w.Header().Set("Content-Security-Policy", pagePolicy)
}

// pagePolicy allows uploadScript and no other script. No other site may show a page in a frame.
var pagePolicy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; " +
	"script-src 'sha256-" + base64.StdEncoding.EncodeToString(scriptSum[:]) +
	"'; connect-src 'self'; frame-ancestors 'self'"

var scriptSum = sha256.Sum256([]byte(uploadScript))

// pageTemplates are the parts of the pages. The icon is empty, else browsers would ask for one.
var pageTemplates = template.Must(template.New("").Funcs(template.FuncMap{
	"human": humanSize,
	"path":  pathOf,
}).Parse(`
{{- define "head"}}<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<link rel="icon" href="data:,">
<title>{{.}}</title>
<style>
:root { color-scheme: light dark; font: 100%/1.5 system-ui, sans-serif }
body { max-width: 60rem; margin: auto; padding: 1rem }
h1, a, pre { overflow-wrap: anywhere; white-space: pre-wrap }
li { overflow-wrap: anywhere }
button, label, input { font: inherit; margin: 0 .5rem .5rem 0 }
label { display: inline-block }
table { width: 100%; border-collapse: collapse }
tr { border-top: 1px solid #8885 }
th, td { padding: .4rem 0; text-align: left }
th + th, td + td { padding-left: 1rem; white-space: nowrap; opacity: .7 }
:is(th, td):nth-child(2) { text-align: right }
@media (max-width: 40rem) { :is(th, td):nth-child(3) { display: none } }
</style>
{{end}}

{{- define "about"}}{{template "head" "Blobnom"}}<h1>Blobnom</h1>
<pre>{{.}}</pre>
<p><a href="blob/">Browse the blobs</a>
{{end}}

{{- define "folder"}}{{template "head" .Folder -}}
<h1>{{range .Crumbs}}<a{{with .URL}} href="{{.}}"{{end}}>{{.Name}}</a>{{end}}</h1>
<div id="upload" hidden><button>Upload files</button><input type="file" multiple hidden>
<button>Upload a folder</button><input type="file" webkitdirectory hidden>
<label>Into the sub-folder <input name="sub" placeholder="none"></label>
<p>Or drop files and folders onto this page. <output></output><ul></ul></div>
<script>{{.Script}}</script>
<table>
<tr><th>Name<th>Size<th>Type<th>Changed (UTC)
{{if ne .Folder "/"}}<tr><td><a href="../">../</a>
{{end}}{{end}}

{{- define "row"}}<tr><td><a{{with path .Key}} href="./{{.}}"{{end}}>{{.Key}}</a>
{{- if .ETag}}<td>{{human .Size}}<td>{{.ContentType}}
<td>{{slice .Updated 0 10}} {{slice .Updated 11 16}}{{end}}
{{end}}`))

// uploadScript uploads chosen and dropped files into the folder. Files that were chosen or dropped
// together are a group: three of them are sent at a time. When a group is done, the script asks,
// once, whether to replace the blobs that exist. When no group is left, it reloads the page, unless
// a file was not uploaded. Without JavaScript the controls stay hidden.
const uploadScript = `
const box = document.getElementById('upload')
const [list, note, sub] = ['ul', 'output', '[name=sub]'].map(name => box.querySelector(name))
let groups = 0
// files is a list of files, or the promise of one. They go into dirs, folders below this page.
async function upload(files, dirs = sub.value.split('/').filter(dir => !/^\.{0,2}$/.test(dir))) {
  groups++
  const waiting = [...await files]
  const existing = []
  const work = async () => {
    while (waiting.length > 0) await send(waiting, dirs, existing)
  }
  await Promise.all([work(), work(), work()])
  const names = existing.map(file => file.path).join('\n').slice(0, 500)
  const question = existing.length + ' exist already. Replace all of them?\n' + names
  if (existing.length > 0 && confirm(question)) {
    for (const file of existing) file.mayReplace = true
    await upload(existing, dirs)
  }
  groups--
  if (groups > 0) return
  if (list.firstChild) note.value = 'Reload this page for the new list. Not uploaded:'
  else location.reload()
}
async function send(waiting, dirs, existing) {
  const file = waiting.shift()
  note.value = waiting.length + ' waiting.'
  file.path ||= file.webkitRelativePath || file.name
  file.row ??= list.appendChild(document.createElement('li'))
  const bar = document.createElement('progress')
  const request = new XMLHttpRequest()
  file.row.replaceChildren(file.path + ': ', bar)
  request.open('PUT', [...dirs, ...file.path.split('/')].map(encodeURIComponent).join('/'))
  if (!file.mayReplace) request.setRequestHeader('If-None-Match', '*')
  request.upload.onprogress = event => { bar.value = event.loaded / (event.total || 1) }
  request.send(file)
  await new Promise(done => { request.onloadend = done })
  if (request.status == 201 || request.status == 202) {
    file.row.remove()
    return
  }
  const exists = request.status == 412
  if (exists) existing.push(file)
  bar.replaceWith(exists ? 'exists already' : request.responseText || 'could not be sent')
}
// walk returns a file with its path, or the list of the files in a folder.
async function walk(entry) {
  const read = (from, method) => new Promise((done, failed) => from[method](done, failed))
  if (entry.isFile) return Object.assign(await read(entry, 'file'), {path: entry.fullPath.slice(1)})
  const reader = entry.createReader()
  const found = []
  while (true) {
    const some = await read(reader, 'readEntries')
    if (some.length == 0) return found.flat()
    found.push(...await Promise.all(some.map(walk)))
  }
}
for (const input of box.querySelectorAll('[type=file]')) {
  input.onchange = () => upload(input.files)
  input.previousElementSibling.onclick = () => {
    input.value = ''
    input.click()
  }
}
document.ondragover = event => event.preventDefault()
document.ondrop = event => {
  event.preventDefault()
  const entries = [...event.dataTransfer.items].map(item => item.webkitGetAsEntry())
  const walked = Promise.all(entries.filter(entry => entry).map(walk))
  const none = error => {
    alert(error)
    return []
  }
  upload(walked.then(found => found.flat(), none))
}
window.onbeforeunload = event => { if (groups > 0) event.preventDefault() }
box.hidden = false
`

// humanSize shows a number of bytes for people: 1.5 MiB.
func humanSize(count int64) string {
	size := float64(count)
	units := []string{"B", "KiB", "MiB", "GiB", "TiB"}
	for size >= 999.5 && len(units) > 1 { // 999.5 would be shown as 1e+03
		size /= 1024
		units = units[1:]
	}
	return fmt.Sprintf("%.3g %s", size, units[0])
}

// ==== Fields =====================================================================================
// What headers and queries ask for. The parsers for writes refuse what they do not understand,
// except an unknown digest beside a known one. Otherwise the server could ignore a precondition and
// do a write that the client did not want.

// plainName is a parameter's name that an answer may quote. Other names may be a secret: a signed
// query that was encoded twice is one long name.
var plainName = regexp.MustCompile(`^[A-Za-z_-]{1,20}$`)

// queryOf parses the query of r. It may have each of the known parameters once, and no other. An
// error never quotes a value, which may be a signature.
func queryOf(r *http.Request, known ...string) (url.Values, error) {
	query, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		return nil, badRequest("the query is malformed")
	}
	for name, values := range query {
		if slices.Contains(known, name) && len(values) == 1 {
			continue
		}
		if !plainName.MatchString(name) {
			name = "another"
		}
		const text = "the query parameters known here, each once, are: %s; refused: %s"
		names := cmp.Or(strings.Join(known, ", "), "none")
		return nil, badRequest(text, names, name)
	}
	return query, nil
}

// writeQueryOf is queryOf for a write, which may be signed.
func writeQueryOf(r *http.Request, known ...string) (url.Values, error) {
	query, err := queryOf(r, append(known, "expires", "sig")...)
	if err != nil {
		return nil, err
	}
	if query.Has("expires") && !query.Has("sig") {
		return nil, badRequest("expires belongs to a signed URL, and there is no sig; use ttl")
	}
	return query, nil
}

func isSigned(r *http.Request) bool {
	return r.URL.RawQuery != "" && r.URL.Query().Has("sig")
}

// ttlOf returns how long an upload is to live, or 0 if it is to stay.
func ttlOf(r *http.Request) (time.Duration, error) {
	query, err := writeQueryOf(r, "ttl")
	if err != nil {
		return 0, err
	}
	if !query.Has("ttl") {
		return 0, nil
	}
	return parseTTL(query.Get("ttl"))
}

// parseTTL parses whole seconds, whole days such as 7d, or a Go duration.
func parseTTL(text string) (time.Duration, error) {
	var ttl time.Duration
	var err error
	digits, isDays := strings.CutSuffix(text, "d")
	switch {
	case isDays:
		var days uint64
		days, err = strconv.ParseUint(digits, 10, 16) // 65,535 days fit a Duration
		ttl = time.Duration(days) * 24 * time.Hour
	case strings.Trim(text, "0123456789") == "":
		ttl, err = time.ParseDuration(text + "s") // an empty text becomes "s", which is an error
	default:
		ttl, err = time.ParseDuration(text)
	}
	if err != nil || ttl <= 0 || ttl > maxTTL {
		const forms = "whole seconds, days such as 7d, or a duration such as 1.5h"
		return 0, badRequest("ttl must be %s, more than 0 and at most 876000h", forms)
	}
	return ttl, nil
}

// contentTypeOf returns the type to store for an upload: the one it names, else that of the key's
// file extension. It refuses uploads that a GET could not give back as they came.
func contentTypeOf(r *http.Request) (string, error) {
	sent := r.Header.Get("Content-Type")
	media, _, _ := strings.Cut(sent, ";")
	media = strings.ToLower(strings.TrimSpace(media))
	isEncoded := strings.Join(r.Header["Content-Encoding"], "") != ""
	switch {
	case media == "multipart/form-data":
		const text = "multipart/form-data is a form; send the file alone, as curl -T FILE does"
		return "", badRequest(text)
	case isEncoded, r.Header.Get("Content-Range") != "":
		const text = "no Content-Encoding or Content-Range; send the whole content as it is"
		return "", badRequest(text)
	case len(sent) > 255, !utf8.ValidString(sent):
		return "", badRequest("the Content-Type is longer than 255 bytes or not UTF-8")
	}
	// curl --data-binary sends this type for every file.
	const anything = "application/x-www-form-urlencoded"
	if media != "" && media != anything {
		return sent, nil
	}
	return typeByExtension(r.PathValue("key")), nil
}

// typeTable has content types, each with its extensions. It is the same on every machine, unlike
// the table of package mime, which reads the files of the system.
const typeTable = `
text/plain txt text log conf ini; text/html html htm; text/css css; text/javascript js mjs;
text/markdown md markdown; text/csv csv; text/xml xml; text/vtt vtt; text/calendar ics;
application/json json map geojson; application/x-ndjson ndjson jsonl;
application/yaml yaml yml; application/toml toml; application/sql sql;
application/wasm wasm; application/pdf pdf; application/epub+zip epub;
application/vnd.sqlite3 sqlite sqlite3; application/zip zip; application/gzip gz tgz;
application/zstd zst; application/x-tar tar; application/x-xz xz; application/x-bzip2 bz2;
application/x-7z-compressed 7z; application/java-archive jar;
application/vnd.debian.binary-package deb; application/x-rpm rpm;
image/jpeg jpg jpeg; image/png png; image/gif gif; image/webp webp; image/avif avif;
image/svg+xml svg; image/heic heic; image/bmp bmp; image/tiff tif tiff;
image/vnd.microsoft.icon ico;
audio/mpeg mp3; audio/mp4 m4a; audio/ogg ogg oga opus; audio/wav wav; audio/flac flac;
video/mp4 mp4 m4v; video/webm webm; video/mpeg mpeg mpg; video/quicktime mov;
video/x-matroska mkv;
font/woff woff; font/woff2 woff2; font/ttf ttf; font/otf otf
`

// typesByExtension is typeTable with the extension as its key. It does not change.
var typesByExtension = func() map[string]string {
	types := map[string]string{}
	for row := range strings.SplitSeq(typeTable, ";") {
		mediaType, extensions, _ := strings.Cut(strings.TrimSpace(row), " ")
		if strings.HasPrefix(mediaType, "text/") {
			mediaType += "; charset=utf-8" // else a browser guesses
		}
		for extension := range strings.FieldsSeq(extensions) {
			types[extension] = mediaType
		}
	}
	return types
}()

func typeByExtension(key string) string {
	extension := strings.TrimPrefix(path.Ext(key), ".")
	return cmp.Or(typesByExtension[strings.ToLower(extension)], octetStream)
}

// conditions are the preconditions of a write, as they were sent: "*" or a list of entity tags, or
// "" if there is none.
type conditions struct {
	match, noneMatch string
}

const tagPattern = `(?:W/)?"[^"\x00-\x20\x7f]*"`

var (
	entityTag = regexp.MustCompile(tagPattern)

	// tagList is "*" or a list of entity tags: each is followed by a comma or ends the list. An
	// element may be empty: RFC 9110 5.6.1.
	tagList = regexp.MustCompile(
		`^[ \t,]*(?:\*|(?:` + tagPattern + `[ \t]*(?:,[ \t,]*|$))+)[ \t,]*$`)
)

// conditionsOf returns the preconditions in h. It refuses dates: two writes may have the same date.
func conditionsOf(h http.Header) (conditions, error) {
	if len(h["If-Unmodified-Since"]) > 0 || len(h["If-Modified-Since"]) > 0 {
		const text = "dates are not supported as conditions of writes, use If-Match"
		return conditions{}, badRequest(text)
	}
	var lists [2]string
	for i, name := range []string{"If-Match", "If-None-Match"} {
		lists[i] = strings.Join(h[name], ",")
		if len(h[name]) > 0 && !tagList.MatchString(lists[i]) {
			const form = `%s must be * or a list of entity tags such as "abc"`
			return conditions{}, badRequest(form, name)
		}
	}
	return conditions{match: lists[0], noneMatch: lists[1]}, nil
}

// hasTag reports whether a list of entity tags is "*" or has one of tags.
func hasTag(list string, tags ...string) bool {
	isNamed := func(tag string) bool { return slices.Contains(tags, tag) }
	isStar := strings.Trim(list, " \t,") == "*"
	return isStar || slices.ContainsFunc(entityTag.FindAllString(list, -1), isNamed)
}

// matchesStrongly reports whether a list names b's content. A weak tag names nothing.
func (b *blob) matchesStrongly(list string) bool {
	plain, zipped := b.etags()
	return hasTag(list, plain, zipped)
}

// matchesWeakly reports whether a list names b's content. A weak tag counts like a strong one.
func (b *blob) matchesWeakly(list string) bool {
	plain, zipped := b.etags()
	return hasTag(list, plain, zipped, "W/"+plain, "W/"+zipped)
}

// refuse returns an errCondition if a condition does not hold. b is what is under the key now; nil:
// nothing. Which comparison is strong and which is weak: RFC 9110 13.1.
func (cond conditions) refuse(b *blob) error {
	if cond.match != "" && (b == nil || !b.matchesStrongly(cond.match)) {
		return fmt.Errorf("%w: If-Match does not name what is there", errCondition)
	}
	if cond.noneMatch != "" && b != nil && b.matchesWeakly(cond.noneMatch) {
		return fmt.Errorf("%w: If-None-Match names what is there", errCondition)
	}
	return nil
}

// digest is a checksum that a client sent for its body.
type digest struct {
	name string // sha-256, sha-512 or md5
	sum  string // in base64, with or without its padding
}

// digestForm matches a digest of a list that has a known name: this name, and its sum, which is
// empty if it is malformed.
var digestForm = regexp.MustCompile(`(?i)(?:^|,)[ \t]*(sha-256|sha-512)=(?::([a-z0-9+/]+=*):)?`)

// digestsOf returns the digests in Repr-Digest and Content-Digest (RFC 9530) and Content-MD5. Each
// of the first two must have a SHA-256 or a SHA-512. Digests with other names are ignored.
func digestsOf(h http.Header) (found []digest, err error) {
	for _, name := range []string{"Repr-Digest", "Content-Digest"} {
		if len(h[name]) == 0 {
			continue
		}
		members := digestForm.FindAllStringSubmatch(strings.Join(h[name], ","), -1)
		isMalformed := func(parts []string) bool { return parts[2] == "" }
		if members == nil || slices.ContainsFunc(members, isMalformed) {
			return nil, badRequest("%s must be sha-256=:BASE64: or sha-512=:BASE64:", name)
		}
		for _, parts := range members {
			found = append(found, digest{strings.ToLower(parts[1]), parts[2]})
		}
	}
	for _, sum := range h["Content-Md5"] {
		found = append(found, digest{"md5", sum})
	}
	return found, nil
}

// bodyCheck compares the body of a request with its digests.
type bodyCheck struct {
	request *http.Request        // its trailer is known once the body is read
	sent    []digest             // in the header
	hashes  map[string]hash.Hash // by name; not sha-256, which every upload computes
}

// bodyCheckOf prepares to compare the body of r. If a trailer is announced, it may bring any
// digest.
func bodyCheckOf(r *http.Request) (*bodyCheck, error) {
	sent, err := digestsOf(r.Header)
	if err != nil {
		return nil, err
	}
	newHashes := map[string]func() hash.Hash{"sha-512": sha512.New, "md5": md5.New}
	hashes := map[string]hash.Hash{}
	for name, newHash := range newHashes {
		isNamed := func(d digest) bool { return d.name == name }
		if len(r.Trailer) > 0 || slices.ContainsFunc(sent, isNamed) {
			hashes[name] = newHash()
		}
	}
	return &bodyCheck{r, sent, hashes}, nil
}

// tee returns a reader of body that feeds the hashes.
func (c *bodyCheck) tee(body io.Reader) io.Reader {
	for _, each := range c.hashes {
		body = io.TeeReader(body, each)
	}
	return body
}

// verify compares the digests with the body. All of it has been read, and sum is its SHA-256.
func (c *bodyCheck) verify(sum []byte) error {
	fromTrailer, err := digestsOf(c.request.Trailer)
	if err != nil {
		return err
	}
	for _, d := range slices.Concat(c.sent, fromTrailer) {
		actual := sum
		if d.name != "sha-256" {
			computed := c.hashes[d.name]
			if computed == nil {
				return badRequest("a digest behind the body needs a header Trailer with its name")
			}
			actual = computed.Sum(nil)
		}
		encoded := base64.StdEncoding.EncodeToString(actual)
		if strings.TrimRight(d.sum, "=") != strings.TrimRight(encoded, "=") {
			const text = "the body does not match its digest: its %s in base64 is %s"
			return badRequest(text, d.name, encoded)
		}
	}
	return nil
}

// acceptsGzip reports whether an Accept-Encoding accepts gzip and does not prefer the content as it
// is. Without the header the answer is no. A weight that is no number is 0; without one it is 1.
func acceptsGzip(h http.Header) bool {
	weights := map[string]float64{} // by coding
	for element := range strings.SplitSeq(strings.Join(h["Accept-Encoding"], ","), ",") {
		coding, params, _ := mime.ParseMediaType(element) // the form is the same: gzip;q=0.5
		text := cmp.Or(params["q"], "1")
		weight, _ := strconv.ParseFloat(text, 64)
		weights[coding] = weight
	}
	weight, isNamed := weights["gzip"]
	if !isNamed {
		weight = weights["*"]
	}
	return weight > 0 && weight >= weights["identity"]
}

var compressibleType = regexp.MustCompile(
	`(?i)^ *(text/[^;]*|application/(json|x-ndjson|javascript|xml|yaml|toml|sql|wasm|` +
		`rtf|graphql|[^;]*\+(json|xml|yaml))|font/[ot]tf)\s*(;|$)`)

// isCompressible reports whether clients that accept gzip get b as gzip: b is stored deflated, or
// deflating it is worth the time.
func (b *blob) isCompressible() bool {
	if b.deflated {
		return true
	}
	return b.size >= minEncode && compressibleType.MatchString(b.contentType)
}

// ==== Access =====================================================================================
// Who may do what. Without auth_token everybody may do everything, except that pages of other
// origins may not write. auth_token opens all routes, and read_token opens GET and HEAD. With
// public_read, GET and HEAD of a blob need no token. A signed URL opens one method of one key until
// it expires. The answer 401 gives no reason that helps to guess a token.

// authorize returns an error unless r may do what it asks for. With auth_token set, a token that is
// sent must be right, even where none is needed. Only the health routes do not look at it.
func (s *server) authorize(r *http.Request) error {
	if s.foreign != nil && s.foreign.Check(r) != nil {
		return errForeign
	}
	if s.cfg.AuthToken == "" || isHealthRoute(r) {
		return nil
	}
	token := sentToken(r)
	isWriter := isSame(token, s.cfg.AuthToken)
	isReader := s.cfg.ReadToken != "" && isSame(token, s.cfg.ReadToken)
	if isTokenSent(r) && !isWriter && !isReader {
		return errUnauthorized
	}
	if r.Method == http.MethodOptions { // the answer says only which methods there are
		return nil
	}
	query := r.URL.Query()
	if query.Has("sig") {
		return s.checkSignature(r, query)
	}
	isRead := r.Method == http.MethodGet || r.Method == http.MethodHead
	isPublic := s.cfg.PublicRead && r.PathValue("key") != ""
	switch {
	case isWriter:
		return nil
	case isRead && (isReader || isPublic):
		return nil
	case isReader:
		return errReadOnly
	}
	return errUnauthorized
}

// authorizeFolder returns an error if r has no token but needs one: public_read does not open
// folder pages. authorize has refused a wrong token, but cannot decide this: whether "a/" is a blob
// or a folder is known only after looking for the blob. A signed URL does not come here, because it
// has a query.
func (s *server) authorizeFolder(r *http.Request) error {
	if s.cfg.AuthToken != "" && !isTokenSent(r) {
		return errUnauthorized
	}
	return nil
}

func isHealthRoute(r *http.Request) bool {
	return r.URL.Path == "/healthz" || r.URL.Path == "/readyz"
}

func isTokenSent(r *http.Request) bool { return r.Header.Get("Authorization") != "" }

// sentToken returns the token in the Authorization header: that of the scheme Bearer, or the
// password of Basic with any user name. It is empty if there is none.
func sentToken(r *http.Request) string {
	if _, password, isBasic := r.BasicAuth(); isBasic {
		return password
	}
	scheme, token, _ := strings.Cut(r.Header.Get("Authorization"), " ")
	if !strings.EqualFold(scheme, "Bearer") {
		return ""
	}
	return strings.TrimSpace(token)
}

// isSame compares secrets. Its time does not depend on how many bytes are equal.
func isSame(a, b string) bool {
	return hmac.Equal([]byte(a), []byte(b))
}

// checkSignature returns an error unless r has a signature for its method and key that has not
// expired, and no query parameter beside it. A signature for GET also serves HEAD.
func (s *server) checkSignature(r *http.Request, query url.Values) error {
	key := r.PathValue("key")
	expires := query.Get("expires")
	isFor := func(method string) bool {
		return isSame(query.Get("sig"), sign(s.cfg.AuthToken, method, key, expires))
	}
	hasTwo := strings.Count(r.URL.RawQuery, "&") == 1 // expires and sig, nothing else
	end, err := strconv.ParseInt(expires, 10, 64)
	if !hasTwo || key == "" || err != nil {
		return errUnauthorized
	}
	isHead := r.Method == http.MethodHead
	isValid := isFor(r.Method) || (isHead && isFor(http.MethodGet))
	if !isValid && slices.ContainsFunc(strings.Split(blobMethods, ", "), isFor) {
		return fmt.Errorf("%w: the signature is for another method", errUnauthorized)
	}
	if !isValid {
		return errUnauthorized
	}
	if s.store.now().Unix() >= end {
		return fmt.Errorf("%w: the signed URL has expired", errUnauthorized)
	}
	return nil
}

// sign returns the signature that opens method for key until expires, in Unix seconds.
func sign(token, method, key, expires string) string {
	h := hmac.New(sha256.New, []byte(token))
	io.WriteString(h, method+"\n"+key+"\n"+expires)
	return hex.EncodeToString(h.Sum(nil))
}

// ==== Store ======================================================================================
// The shards as one store: which shard has a key, and listings over all of them.

// hashes are the placement functions. A key's shard is the value modulo num_shards.
var hashes = map[string]func(key string) uint64{
	"fnv1a": func(key string) uint64 {
		h := fnv.New64a()
		io.WriteString(h, key)
		return h.Sum64()
	},
	"crc32c": func(key string) uint64 {
		return uint64(crc32.Checksum([]byte(key), crc32.MakeTable(crc32.Castagnoli)))
	},
	"sha256": func(key string) uint64 {
		sum := sha256.Sum256([]byte(key))
		return binary.BigEndian.Uint64(sum[:])
	},
}

type store struct {
	dir     string
	shards  []*shard
	hash    func(string) uint64
	maxBlob int64
	async   bool             // answer once queued
	deflate bool             // contents that shrink are stored deflated
	now     func() time.Time // the clock of writes and of expiry; any goroutine may call it
	log     *slog.Logger
	lock    *sql.DB // of the directory: see lockDir

	pending      atomic.Int64    // bytes of queued writes: see acquire
	maxPending   int64           // maximum of pending
	queueTimeout time.Duration   // how long a writer waits for room in pending
	stopping     context.Context // ended by stop: nobody waits any more
	stop         func()
	drainTimeout time.Duration // how long after stop a write that was answered 202 is still tried
	isOverdue    atomic.Bool   // drainTimeout is over: such a write is given up
	reserve      *reserve

	batches, operations, commitNanos atomic.Int64 // of the transactions so far
}

// checkKey returns an errBadRequest if key cannot be a key.
func checkKey(key string) error {
	switch {
	case key == "" || len(key) > maxKeyBytes:
		return badRequest("the key has %d bytes, it must have 1 to %d", len(key), maxKeyBytes)
	case !utf8.ValidString(key) || strings.ContainsRune(key, 0):
		return badRequest("the key is not valid UTF-8, or has a NUL byte")
	}
	return nil
}

// shardOf returns the shard that has key, or why the key or the shard cannot be used.
func (st *store) shardOf(key string) (*shard, error) {
	if err := checkKey(key); err != nil {
		return nil, err
	}
	sh := st.shards[st.hash(key)%uint64(len(st.shards))]
	return sh, sh.broken
}

// openStore opens the data directory of cfg for a server, and creates it if nothing is there. It
// refuses one that is in use, is an incomplete copy, or is another program's.
func openStore(
	ctx context.Context, cfg *config, log *slog.Logger, now func() time.Time,
) (*store, error) {
	lock, err := claimDir(cfg.DataDir)
	if err != nil {
		return nil, err
	}
	st, err := openLocked(ctx, cfg, lock, log, now)
	if err != nil {
		return nil, err
	}
	st.reserve.begin() // migrate needs none: in a copy nothing is deleted
	return st, nil
}

// openLocked opens the data directory of cfg, of which the caller has the lock. It refuses one with
// another record than cfg. A corrupt shard fails alone, with errCorrupt. No blob is written before
// the whole directory is accepted. Opening a shard changes at most two things: it sets the WAL
// mode, and removes an empty WAL. After an error the lock is closed.
func openLocked(
	ctx context.Context, cfg *config, lock *sql.DB, log *slog.Logger, now func() time.Time,
) (*store, error) {
	st := &store{
		dir:          cfg.DataDir,
		hash:         hashes[cfg.Hash],
		maxBlob:      min(cmp.Or(cfg.MaxBlobBytes, hardMaxBlob), hardMaxBlob),
		async:        cfg.AsyncWrite,
		deflate:      cfg.StorageCompression,
		now:          now,
		log:          log,
		lock:         lock,
		maxPending:   cfg.MaxPendingBytes,
		queueTimeout: queueTimeout,
		drainTimeout: drainTimeout,
		reserve:      &reserve{path: filepath.Join(cfg.DataDir, reserveFile), log: log},
	}
	st.stopping, st.stop = context.WithCancel(ctx)
	markOverdue := func() { st.isOverdue.Store(true) }
	startDraining := func() { time.AfterFunc(st.drainTimeout, markOverdue) }
	context.AfterFunc(st.stopping, startDraining)
	if err := st.open(cfg); err != nil {
		return nil, errors.Join(err, st.close())
	}
	for _, sh := range st.shards {
		if sh.broken == nil {
			sh.startBatcher(cfg)
		}
	}
	return st, nil
}

// open creates what is missing in a new directory, and opens the shards.
func (st *store) open(cfg *config) error {
	if err := st.createShards(cfg); err != nil {
		return fmt.Errorf("cannot create the shards: %w", err)
	}
	err := st.openShards(cfg)
	if errors.Is(err, errFull) { // opening a shard writes: the reserve makes room for that
		st.reserve.setFull(err)
		st.reserve.giveUp()
		if err := st.closeShards(); err != nil {
			return err
		}
		return st.openShards(cfg)
	}
	return err
}

// close commits what is queued and closes everything. Whatever a request still asks of the store
// fails.
func (st *store) close() error {
	err := st.closeShards()
	if st.reserve.isDiskFull() {
		st.reserve.write() // closing may have made room, which the next start needs
	}
	return errors.Join(err, st.lock.Close())
}

// closeShards commits what is queued and closes the databases. The lock and the reserve are kept.
func (st *store) closeShards() (err error) {
	for _, sh := range st.shards {
		err = errors.Join(err, sh.close())
	}
	return err
}

// listing asks for a page: up to limit keys that begin with prefix and are above after. Keys that
// contain the delimiter after the prefix are grouped: they give one row, a folder, whose key ends
// with the delimiter.
type listing struct {
	prefix, after, delimiter string
	limit                    int
}

// folderOf returns the folder that groups key, or "" if key is a row of its own.
func (l *listing) folderOf(key string) string {
	rest, isBelow := strings.CutPrefix(key, l.prefix)
	if !isBelow || l.delimiter == "" {
		return ""
	}
	name, _, isGrouped := strings.Cut(rest, l.delimiter)
	if !isGrouped {
		return ""
	}
	return l.prefix + name + l.delimiter
}

// listed is a row of a listing. A folder has only a key.
type listed struct {
	Key         string `json:"key"`
	Size        int64  `json:"size"` // bytes, as the client sees them
	ContentType string `json:"content_type"`
	ETag        string `json:"etag"`
	Created     string `json:"created"`
	Updated     string `json:"updated"`
	Version     int64  `json:"version"`
	Expires     string `json:"expires,omitempty"`
}

func (row listed) isFolder() bool { return row.ETag == "" }
func (row listed) isFile() bool   { return !row.isFolder() }

func compareKeys(a, b listed) int  { return strings.Compare(a.Key, b.Key) }
func haveSameKey(a, b listed) bool { return a.Key == b.Key }

// A key has no NUL and no byte 0xff. So nothing lies between a key and the key with afterKey, and
// every key that begins with a prefix is below the prefix with afterPrefix.
const (
	afterKey    = "\x00"
	afterPrefix = "\xff"
)

// list returns a page in key order over all shards, and whether more rows follow. It waits for the
// writes that were answered 202 before it, and is no snapshot of the store.
func (st *store) list(l listing) (page []listed, more bool, err error) {
	// Only keys of [from, to) are read.
	from := max(l.prefix, l.after+afterKey)
	if l.after != "" && l.folderOf(l.after) == l.after {
		from = l.after + afterPrefix // the last page ended with this folder: skip its keys
	}
	to := l.prefix + afterPrefix
	// The page has one row more than the limit, which only tells that more follow. Once it has that
	// many, no key from the last one on is of interest.
	for _, sh := range st.shards {
		if sh.broken != nil {
			return nil, false, sh.broken // a listing without the shard's keys would be a lie
		}
		rows, err := sh.list(l, from, to)
		if err != nil {
			return nil, false, err
		}
		page = append(page, rows...)
		slices.SortFunc(page, compareKeys)
		page = slices.CompactFunc(page, haveSameKey) // several shards may have keys of one folder
		if len(page) > l.limit {
			page = page[:l.limit+1]
			to = page[l.limit].Key
		}
	}
	if len(page) > l.limit {
		return page[:l.limit], true, nil
	}
	return page, false, nil
}

// rows returns all rows of l, however many. They are read page by page, and an error ends them.
func (st *store) rows(l listing) iter.Seq2[listed, error] {
	return func(yield func(listed, error) bool) {
		asked := l
		for {
			page, more, err := st.list(asked)
			if err != nil {
				yield(listed{}, err)
				return
			}
			for _, row := range page {
				if !yield(row, nil) {
					return
				}
			}
			if !more {
				return
			}
			asked.after = page[len(page)-1].Key
		}
	}
}

// hasPrefix reports whether a committed blob's key begins with prefix. It leaves out shards that
// cannot be read, and waits for no queued write: whoever misses a key need not wait for other keys.
func (st *store) hasPrefix(prefix string) bool {
	for _, sh := range st.shards {
		if sh.broken == nil && sh.hasPrefix(prefix) {
			return true
		}
	}
	return false
}

// ==== Directory ==================================================================================
// The data directory: who may use it, what it says of itself, how it is created and opened. A
// directory whose record differs from the configuration is refused: keys would be looked for in the
// wrong shard, and seem to be gone.

const (
	lockFile     = "blobnom.lock"    // a SQLite file; who writes into the directory has locked it
	reserveFile  = "blobnom.reserve" // head-room for a full disk, given up when needed
	creatingFile = "blobnom.new"     // the directory's record, while its shards are being created
	partialFile  = "blobnom.partial" // in a copy that backup or migrate has not completed
)

// claimDir locks dir for a server, unless it is another program's or an incomplete copy.
func claimDir(dir string) (*sql.DB, error) {
	if err := refuseDir(dir); err != nil {
		return nil, err
	}
	lock, err := lockDir(dir)
	if err != nil {
		return nil, err
	}
	// Look again: a copy may have been killed while claimDir waited for the lock.
	if err := refusePartial(dir); err != nil {
		return nil, errors.Join(err, lock.Close())
	}
	return lock, nil
}

// lockDir locks dir, which it creates if it is not there, until the returned database is closed.
// The lock is a SQLite file in an exclusive transaction: it works anywhere and ends with the
// process.
func lockDir(dir string) (*sql.DB, error) {
	path := filepath.Join(dir, lockFile)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("cannot create the data directory: %w", err)
	}
	if err := createFile(path); err != nil { // SQLite would not say why it cannot
		return nil, fmt.Errorf("cannot lock the data directory: %w", err)
	}
	// The journal is in memory, because a full disk has no room for it. Another server that is
	// starting may hold the lock for a moment: wait 300 ms.
	lock := openDB(path, "_pragma=journal_mode(memory)&_pragma=busy_timeout(300)")
	lock.SetMaxOpenConns(1) // kept open: the transaction is the lock
	// The transaction changes something and is never committed. On a read-only file BEGIN EXCLUSIVE
	// alone succeeds for everybody.
	_, err := lock.Exec("BEGIN EXCLUSIVE; PRAGMA user_version = 1")
	if err == nil {
		return lock, nil
	}
	lock.Close()
	if errors.Is(translate(err), errBusy) {
		return nil, fmt.Errorf("data directory %s is in use by another blobnom, "+
			"or its file system has no locks: %w", dir, err)
	}
	return nil, fmt.Errorf("cannot lock %s: %w", path, err)
}

// refuseDir returns an error if dir is another program's, or an incomplete copy. If the lock file
// is there, the directory is ours. Then no shard is opened to look: see refuseForeign.
func refuseDir(dir string) error {
	if err := refusePartial(dir); err != nil {
		return err
	}
	if fileExists(filepath.Join(dir, lockFile)) {
		return nil
	}
	return refuseForeign(dir, 0)
}

// refusePartial returns an error if dir is a copy that is not complete.
func refusePartial(dir string) error {
	if fileExists(filepath.Join(dir, partialFile)) {
		return fmt.Errorf("%s is an incomplete copy: "+
			"run the interrupted backup or migrate again, or remove it", dir)
	}
	return nil
}

// refuseForeign returns an error if shard i in dir is another program's database. This process must
// not have the file open: to close it here drops all locks that the process has on it.
func refuseForeign(dir string, i int) error {
	path := filepath.Join(dir, shardName(i))
	if sizeOf(path) <= 0 {
		return nil
	}
	db := openDB(path, "mode=ro&immutable=1") // immutable: no file is made
	defer db.Close()
	// The count makes SQLite read the schema, which fails if the file is damaged.
	const query = `SELECT application_id
		FROM pragma_application_id, (SELECT count(*) FROM sqlite_schema)`
	var id int
	err := db.QueryRow(query).Scan(&id)
	if err != nil || id == applicationID {
		return nil // it may be ours: opening it will tell what is wrong
	}
	return fmt.Errorf("%s was written by the Rust Blobnom or by another program, "+
		"and stays as it is; set data_dir to a new directory, "+
		"and to copy the blobs into it run: blobnom migrate %s", path, dir)
}

func shardName(i int) string { return fmt.Sprintf("shard_%d.db", i) }

// shardFiles returns the indexes of the shards in dir, in order; it is an error if there are none.
func shardFiles(dir string) (indexes []int, err error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("cannot read %s: %w", dir, err)
	}
	for _, e := range entries {
		var i int
		fmt.Sscanf(e.Name(), "shard_%d.db", &i)
		if i >= 0 && e.Name() == shardName(i) && !e.IsDir() {
			indexes = append(indexes, i)
		}
	}
	if len(indexes) == 0 {
		return nil, fmt.Errorf("%s holds no shards", dir)
	}
	slices.Sort(indexes)
	return indexes, nil
}

// record is what each shard knows of its directory.
type record struct {
	NumShards, Shard int64
	Hash, Directory  string // the directory's id is random
}

func (r *record) String() string {
	return fmt.Sprintf("shard %d of %d, placed by %s, of directory %s",
		r.Shard, r.NumShards, r.Hash, r.Directory)
}

var errMisplaced = errors.New("it does not belong here")

// fits returns an errMisplaced unless r says that it is shard i of the same directory as first.
func (r *record) fits(first *record, i int) error {
	want := *first
	want.Shard = int64(i)
	if *r != want || want.Shard >= want.NumShards {
		return fmt.Errorf("%w: it is %v, where %v must be", errMisplaced, r, &want)
	}
	return nil
}

// recordOf reads what a shard of ours knows of its directory. It returns errCorrupt if the file is
// not a shard, and errNewer if a newer version of this program wrote it.
func recordOf(db *sql.DB) (*record, error) {
	r := &record{}
	var application, version int64
	err := db.QueryRow(`SELECT application_id, user_version, n.value, s.value, h.value, d.value
		FROM pragma_application_id, pragma_user_version, meta n, meta s, meta h, meta d
		WHERE n.key = 'num_shards' AND s.key = 'shard' AND h.key = 'hash' AND d.key = 'directory'`).
		Scan(&application, &version, &r.NumShards, &r.Shard, &r.Hash, &r.Directory)
	if errors.Is(err, sql.ErrNoRows) {
		return nil, fmt.Errorf("%w: meta is incomplete", errCorrupt)
	}
	if err != nil {
		return nil, schemaError(err)
	}
	if version > schemaVersion {
		return nil, fmt.Errorf("schema version %d is %w", version, errNewer)
	}
	if application != applicationID || version != schemaVersion || hashes[r.Hash] == nil ||
		r.NumShards < 1 || r.NumShards > maxShards {
		return nil, fmt.Errorf("%w: application id %#x, schema version %d, and it says: %v",
			errCorrupt, application, version, r)
	}
	return r, nil
}

// createShards makes the shards of a new directory, each in its place. The marker, creatingFile, is
// written first and removed last: if it is there, an earlier start was killed, and this one
// completes its work, whatever cfg says now. Every step may be repeated, even after writes, because
// a power loss can bring a removed file back.
func (st *store) createShards(cfg *config) error {
	marker := filepath.Join(st.dir, creatingFile)
	indexes, _ := shardFiles(st.dir) // if dir cannot be read, creation fails
	if len(indexes) > 0 && !fileExists(marker) {
		return nil
	}
	r, err := recordToCreate(marker, cfg)
	if err != nil {
		return err
	}
	for i := range r.NumShards {
		r.Shard = i
		if err := st.stopping.Err(); err != nil {
			return err
		}
		path := filepath.Join(st.dir, shardName(int(r.Shard)))
		if err := createShard(path, r); err != nil {
			return fmt.Errorf("%s: %w", path, translate(err))
		}
	}
	// The names are on the disk before the marker goes, else a power loss could remove shards that
	// have acknowledged writes.
	if err := syncPaths(st.dir, parentOf(st.dir)); err != nil {
		return err
	}
	if err := os.Remove(marker); err != nil {
		return err
	}
	return syncPaths(st.dir)
}

// recordToCreate returns the record of the directory that is being created. It reads it from the
// marker of a start that was killed, or makes it.
func recordToCreate(marker string, cfg *config) (*record, error) {
	r := &record{}
	text, _ := os.ReadFile(marker)
	if json.Unmarshal(text, r) == nil {
		return r, nil
	}
	id := rand.Text()
	if len(text) == len(id) { // an older version wrote the id alone
		id = string(text)
	}
	// The marker is on the disk before the first shard is made, else a second start could choose
	// another id.
	r = &record{NumShards: cfg.NumShards, Hash: cfg.Hash, Directory: id}
	text, _ = json.Marshal(r) // cannot fail
	if err := os.WriteFile(marker, text, 0o600); err != nil {
		return nil, err
	}
	return r, syncPaths(marker, filepath.Dir(marker))
}

func createShard(path string, r *record) error {
	if err := createFile(path); err != nil {
		return err
	}
	db := openDB(path, "_pragma=busy_timeout(1000)")
	defer db.Close()
	db.SetMaxOpenConns(1) // the pragmas and the transaction belong to one connection
	_, err := db.Exec(fmt.Sprintf(`PRAGMA page_size = %d;
		PRAGMA auto_vacuum = INCREMENTAL; BEGIN; %s
		INSERT OR IGNORE INTO meta VALUES
			('num_shards', %d), ('shard', %d), ('hash', '%s'), ('directory', '%s');
		PRAGMA application_id = %d; PRAGMA user_version = %d; COMMIT; PRAGMA journal_mode = WAL`,
		newPageBytes, schema, r.NumShards, r.Shard, r.Hash, r.Directory, applicationID,
		schemaVersion))
	return err
}

// openShards opens every shard, and compares the records with one another and with cfg.
func (st *store) openShards(cfg *config) error {
	indexes, err := shardFiles(st.dir)
	if err != nil {
		return err
	}
	var first *record // of the first shard that can be read
	st.shards = nil
	for _, i := range indexes {
		if err := st.stopping.Err(); err != nil {
			return err
		}
		if err := refuseForeign(st.dir, i); err != nil {
			return err
		}
		sh, r, err := openShard(st, i, cfg)
		st.shards = append(st.shards, sh)
		if errors.Is(err, errCorrupt) && i < int(cfg.NumShards) {
			sh.broken = err
			st.log.Error("shard is corrupt, its keys are answered 500; restore it",
				"shard", i, "error", err)
			continue
		}
		if err != nil {
			return err
		}
		if first == nil {
			first = r
		}
		if err := r.fits(first, i); err != nil {
			return fmt.Errorf("%s: %w; restore the right file from a backup", sh.path, err)
		}
	}
	if first == nil {
		return fmt.Errorf("no shard in %s can be read; restore the directory from a backup", st.dir)
	}
	if first.NumShards != cfg.NumShards || first.Hash != cfg.Hash {
		return fmt.Errorf("data directory %s holds %d shards placed by %s, "+
			"the configuration asks for num_shards = %d and hash = %q; "+
			"set them as they were, "+
			"or copy the blobs into a new data_dir with: blobnom migrate %[1]s",
			st.dir, first.NumShards, first.Hash, cfg.NumShards, cfg.Hash)
	}
	missing := missingShards(indexes, cfg.NumShards)
	if len(missing) > 0 {
		return fmt.Errorf("in %s, %s is missing; restore it, or the directory, from a backup",
			st.dir, shardName(missing[0]))
	}
	return nil
}

// missingShards returns which of 0 to count-1 are not in indexes.
func missingShards(indexes []int, count int64) (missing []int) {
	for i := range int(count) {
		if !slices.Contains(indexes, i) {
			missing = append(missing, i)
		}
	}
	return missing
}

// sizeOf returns the size of a file, negative if there is none.
func sizeOf(name string) int64 {
	info, err := os.Stat(name)
	if err != nil {
		return -1
	}
	return info.Size()
}

func fileExists(name string) bool { return sizeOf(name) >= 0 }

// createFile makes an empty file if there is none. SQLite itself would let everybody read it.
func createFile(path string) error {
	f, err := os.OpenFile(path, os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	return f.Close()
}

// parentOf returns the directory that dir is in.
func parentOf(dir string) string { return filepath.Join(dir, "..") }

// syncPaths makes files durable, or the names in directories.
func syncPaths(paths ...string) error {
	for _, path := range paths {
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		err = f.Sync()
		f.Close() // of a file that was only read: it has no error to tell
		if err != nil {
			return err
		}
	}
	return nil
}

// ==== Shard ======================================================================================
// One database: a pool of readers, one writer behind a batcher, and whether it is well.

type shard struct {
	store   *store
	index   int
	path    string
	broken  error // set if the shard is corrupt and could not be opened: nothing of it works
	batcher *batcher
	cache   *cache
	nextID  atomic.Int64 // content ids: each is handed out once in a run

	readers                     *sql.DB
	rowStmt, pageStmt, dataStmt *sql.Stmt // a row by key, rows by keys, a chunk's data by its id

	// While the batcher runs, only its goroutine uses the fields from here to recentBytes. open
	// uses them before it starts, and close after it has ended.
	writer     *sql.DB              // one connection
	findStmt   *sql.Stmt            // a row by key
	prepared   map[string]*sql.Stmt // by text
	wasCorrupt bool                 // the last outcome called the file damaged: a second one counts
	syncFailed bool                 // nothing may be written or checkpointed any more
	durability string               // of the configuration
	syncLevel  string               // PRAGMA synchronous, as it is set

	pageBytes int64 // of the database

	written      int64     // bytes that went into the WAL since the start
	checkpointed int64     // written, at the last try of a checkpoint
	sampledBytes int64     // written, at upkeep's last sample
	sampledAt    time.Time // when that was
	recentBytes  int64     // bytes in the second before that

	// Contents that a reader or an upload needs, and the sweep leaves alone: see unusedOrphan,
	// which holds lookups for writing.
	lookups sync.RWMutex // held for reading from before a row is read until its content is in held
	heldMu  sync.Mutex
	held    map[int64]int // use counts by content id; guarded by heldMu

	// state is why the shard is not ready, nil if it is. setState sets it. Any goroutine may read
	// it.
	stateMu sync.Mutex
	state   error

	failedWrites atomic.Int64 // writes that failed after their 202
	countMu      sync.Mutex   // guards the next two
	counted      time.Time
	count        int64 // blobs, when they were counted
}

// openShard opens one database file. On an error the shard is returned all the same, closed. Its
// error is an errCorrupt only if SQLite finds the file damaged, or if the file is not a shard: what
// cannot be read just now must not be taken for something to restore.
func openShard(st *store, i int, cfg *config) (*shard, *record, error) {
	sh := &shard{
		store:      st,
		index:      i,
		path:       filepath.Join(st.dir, shardName(i)),
		held:       map[int64]int{},
		prepared:   map[string]*sql.Stmt{},
		durability: cfg.Durability,
		syncLevel:  cfg.Durability,
		cache: &cache{
			limit:   cacheLimit() / int(cfg.NumShards),
			entries: map[string]*blob{},
			blocked: map[string]bool{},
		},
	}
	// A backup comes out of VACUUM INTO without WAL mode, so opening sets it. The two fullfsync
	// matter on macOS, where fsync alone does not reach the disk.
	syncsFully := cfg.Durability == "full"
	sh.writer = openDB(sh.path, strings.Join([]string{
		"mode=rw",
		busyPragma(),
		"_pragma=journal_mode(wal)",
		fmt.Sprintf("_pragma=synchronous(%s)", cfg.Durability),
		fmt.Sprintf("_pragma=fullfsync(%t)", syncsFully),
		fmt.Sprintf("_pragma=checkpoint_fullfsync(%t)", syncsFully),
		fmt.Sprintf("_pragma=journal_size_limit(%d)", reserveBytes),
		"_pragma=temp_store(memory)",
		"_pragma=wal_autocheckpoint(0)", // see checkpointIfDue
	}, "&"))
	sh.writer.SetMaxOpenConns(1)
	sh.readers = openReadOnly(sh.path)
	sh.readers.SetMaxOpenConns(8) // enough: a read takes microseconds. Each has a page cache
	sh.readers.SetMaxIdleConns(8)
	var r *record
	err := sh.tryFiles()
	if err == nil {
		r, err = sh.open()
		if isCorrupt(err) {
			r, err = sh.open() // SQLite may have said so of one read that failed
		}
	}
	if err == nil {
		return sh, r, nil
	}
	sh.readers.Close()
	sh.writer.Close()
	return sh, nil, fmt.Errorf("cannot open %s: %w", sh.path, sh.reasonOf(err))
}

// reasonOf returns why the shard, which is closed again, could not be opened. A disk that cannot be
// read must not be taken for a shard to restore.
func (sh *shard) reasonOf(err error) error {
	err = sh.explain(err)
	if !isCorrupt(err) {
		return err
	}
	for _, path := range []string{sh.path, sh.path + "-wal"} {
		if readErr := readAll(path); readErr != nil {
			return readErr
		}
	}
	return err
}

// readAll returns the system's error if a file cannot be read. The process must not have it open in
// SQLite: to close a file drops all locks that the process has on it.
func readAll(path string) error {
	f, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = io.Copy(io.Discard, f)
	return err
}

// tryFiles returns why a file of the shard cannot be opened. SQLite must not have them open: see
// readAll.
func (sh *shard) tryFiles() error {
	if sizeOf(sh.path) == 0 { // opening it would delete a WAL that may hold everything
		return fmt.Errorf("%w: the file is empty", errCorrupt)
	}
	for _, path := range []string{sh.path, sh.path + "-wal", sh.path + "-shm"} {
		if err := tryOpen(path); err != nil {
			return err
		}
	}
	return nil
}

// open reads the shard's record and prepares its statements.
func (sh *shard) open() (*record, error) {
	r, err := recordOf(sh.writer)
	if err != nil {
		return nil, err
	}
	// The highest id that still matters: each chunk belongs to a blob or an orphan.
	const lastID = `SELECT max(coalesce((SELECT max(id) FROM blobs), 0),
		coalesce((SELECT max(id) FROM orphans), 0))`
	var last int64
	if err := sh.writer.QueryRow(lastID).Scan(&last); err != nil {
		return nil, schemaError(err)
	}
	sh.nextID.Store(last)
	if err := sh.writer.QueryRow("PRAGMA page_size").Scan(&sh.pageBytes); err != nil {
		return nil, err
	}
	return r, schemaError(sh.prepare())
}

// tryOpen tries to open a file of a shard. It returns the system's error, which SQLite does not
// tell. If the file is empty and this user may not open it, tryOpen removes it: a backup brings an
// empty WAL along, which is not needed, and whoever restored it may have been another user.
func tryOpen(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if errors.Is(err, os.ErrPermission) && sizeOf(path) == 0 {
		return os.Remove(path)
	}
	if err != nil {
		return err
	}
	return f.Close()
}

// openDB returns a pool for the database at path; nothing is opened yet. params are URI parameters.
func openDB(path, params string) *sql.DB {
	uri := url.URL{Scheme: "file", OmitHost: true, Path: path, RawQuery: params}
	db, _ := sql.Open("sqlite", uri.String()) // fails only for an unknown driver
	return db
}

func openReadOnly(path string) *sql.DB {
	return openDB(path, "mode=ro&_pragma=cache_size(-512)&"+busyPragma())
}

// busyPragma is the URI parameter that lets SQLite wait for another process's lock.
func busyPragma() string {
	return fmt.Sprintf("_pragma=busy_timeout(%d)", busyTimeout.Milliseconds())
}

func (sh *shard) prepare() error {
	for _, s := range []struct {
		statement **sql.Stmt
		db        *sql.DB
		query     string
	}{
		{&sh.rowStmt, sh.readers, rowQuery},
		{&sh.pageStmt, sh.readers, pageQuery},
		{&sh.dataStmt, sh.readers, dataQuery},
		{&sh.findStmt, sh.writer, rowQuery},
	} {
		var err error
		*s.statement, err = s.db.Prepare(s.query)
		if err != nil {
			return err
		}
	}
	return nil
}

// startBatcher starts the goroutine that writes and does upkeep.
func (sh *shard) startBatcher(cfg *config) {
	const longest = math.MaxInt64 / int64(time.Millisecond)
	sh.batcher = &batcher{
		size:     int(cfg.BatchSize),
		window:   time.Duration(min(cfg.BatchTimeoutMS, longest)) * time.Millisecond,
		stopping: sh.store.stopping.Done(),
		commit:   sh.commit,
		upkeep:   sh.upkeep,
		wake:     make(chan struct{}, 1),
		ended:    make(chan struct{}),
		newest:   map[string]*op{},
		stuck:    make(chan struct{}),
	}
	go sh.batcher.run()
}

// close commits what is queued and closes the database. The writer closes last: with it SQLite
// empties the WAL and removes it. After a failed sync the writer stays open, so that nothing is
// copied out of the WAL: the next start finds out by checksums what is there.
func (sh *shard) close() error {
	if sh.batcher != nil { // nil if the shard is broken, or its store could not be opened
		sh.batcher.close()
	}
	err := sh.readers.Close()
	if sh.syncFailed {
		return err
	}
	if sh.batcher != nil {
		walErr := sh.truncateWAL()
		if errors.Is(walErr, errFull) {
			sh.store.reserve.giveUp()
			walErr = sh.truncateWAL()
		}
		if walErr != nil {
			sh.store.log.Warn("the WAL stays, the next start reads it",
				"shard", sh.index, "error", walErr)
		}
	}
	if sh.syncFailed { // just now
		return err
	}
	return errors.Join(err, sh.writer.Close())
}

// setState makes err the shard's state; nil: it is well. Damage and a failed sync stay until a
// restart. Any other state ends with the next write that succeeds; upkeep tries one every second.
func (sh *shard) setState(err error) {
	sh.stateMu.Lock()
	defer sh.stateMu.Unlock()
	old := sh.state
	if errors.Is(old, errNotSynced) {
		return
	}
	if errors.Is(old, errCorrupt) && !errors.Is(err, errNotSynced) {
		return
	}
	sh.state = err
	if err != nil && old == nil {
		sh.store.log.Error("shard is not ready", "shard", sh.index, "error", err)
	}
	if err == nil && old != nil {
		sh.store.log.Info("shard is ready again", "shard", sh.index)
	}
}

// currentState returns why the shard is not ready, nil if it is.
func (sh *shard) currentState() error {
	sh.stateMu.Lock()
	defer sh.stateMu.Unlock()
	return sh.state
}

// noteReadError translates an error of a read. Damage that SQLite finds in the file becomes the
// shard's state. Writes use recordOutcome.
func (sh *shard) noteReadError(err error) error {
	err = translate(err)
	if errors.Is(err, errCorrupt) {
		sh.setState(err)
	}
	return err
}

// health returns why the shard is not ready, nil if it reads and can be written to.
func (sh *shard) health() error {
	if sh.broken != nil {
		return sh.broken
	}
	if err := sh.currentState(); err != nil {
		return err
	}
	if sh.store.reserve.isDiskFull() {
		return errFull
	}
	var n int
	row := sh.readers.QueryRow("SELECT count(*) FROM (SELECT 1 FROM blobs LIMIT 1)")
	return translate(row.Scan(&n))
}

// ==== Reads ======================================================================================
// Looking for a row, or for rows of the listing. Request goroutines run this. A read waits for the
// writes of its key that were answered 202.

const blobColumns = `id, key, size, stored, codec, coalesce(crc32, 0), sha256, content_type,
	created_at, updated_at,
	coalesce(expires_at, 0), version`

const rowQuery = `SELECT ` + blobColumns + `, CASE WHEN ?2 THEN data END FROM blobs WHERE key = ?1`
const pageQuery = `SELECT ` + blobColumns + `, NULL FROM blobs
	WHERE key >= ?1 AND key < ?2 AND (expires_at IS NULL OR expires_at > ?3) ORDER BY key LIMIT ?4`
const dataQuery = `SELECT data FROM chunks WHERE id = ?`

// read returns the content under key, or errNoBlob; headOnly leaves it on the disk. The caller
// closes it.
func (sh *shard) read(key string, headOnly bool) (*blobReader, error) {
	if err := sh.batcher.settle(key); err != nil {
		return nil, err
	}
	b, generation := sh.cache.get(key)
	if b == nil {
		return sh.lookUp(key, headOnly, generation)
	}
	if b.expired(sh.store.now().UnixMilli()) {
		return nil, errNoBlob
	}
	return sh.reader(b), nil
}

// lookUp reads the row of a key that was not in the cache at generation. It does not let go of
// lookups before it holds a chunked content.
func (sh *shard) lookUp(key string, headOnly bool, generation int64) (*blobReader, error) {
	sh.lookups.RLock()
	defer sh.lookups.RUnlock()
	b, _, err := scanBlob(sh.rowStmt.QueryRow(key, !headOnly))
	if isCorrupt(err) {
		b, _, err = scanBlob(sh.rowStmt.QueryRow(key, !headOnly))
	}
	if err != nil {
		return nil, sh.noteReadError(err)
	}
	b.renderHeader()
	if b.data != nil && !b.deflated { // blobReader verifies deflated and chunked contents
		if err := b.compare(crc32.ChecksumIEEE(b.data)); err != nil {
			return nil, err
		}
	}
	if b.expired(sh.store.now().UnixMilli()) {
		return nil, errNoBlob
	}
	if !headOnly {
		sh.cache.put(key, b, generation)
	}
	if b.chunked() {
		sh.hold(b.id)
	}
	return sh.reader(b), nil
}

func (sh *shard) reader(b *blob) *blobReader {
	return &blobReader{shard: sh, dataStmt: sh.dataStmt, blob: b}
}

// hold adds a use of a content: a content in use is not swept. release takes it back.
func (sh *shard) hold(contentID int64) {
	sh.heldMu.Lock()
	defer sh.heldMu.Unlock()
	sh.held[contentID]++
}

func (sh *shard) release(contentID int64) {
	sh.heldMu.Lock()
	defer sh.heldMu.Unlock()
	sh.held[contentID]--
	if sh.held[contentID] == 0 {
		delete(sh.held, contentID)
	}
}

func (sh *shard) isHeld(contentID int64) bool {
	sh.heldMu.Lock()
	defer sh.heldMu.Unlock()
	return sh.held[contentID] > 0
}

// precheck returns an errCondition if cond does not hold now; it saves reading a body in vain.
func (sh *shard) precheck(key string, cond conditions) error {
	if cond == (conditions{}) {
		return nil
	}
	br, err := sh.read(key, true)
	if errors.Is(err, errNoBlob) {
		return cond.refuse(nil)
	}
	if err != nil {
		return err
	}
	defer br.close()
	return cond.refuse(br.blob)
}

// scanBlob scans a row of blobColumns and data. It returns errNoBlob if there is none. With
// errDamaged it returns what it understands of the row, too.
func scanBlob(row interface{ Scan(...any) error }) (*blob, string, error) {
	b := &blob{}
	var key string
	var sum []byte
	err := row.Scan(&b.id, &key, &b.size, &b.stored, &b.deflated, &b.crc, &sum, &b.contentType,
		&b.created, &b.updated, &b.expires, &b.version, &b.data)
	if errors.Is(err, sql.ErrNoRows) {
		return nil, "", errNoBlob
	}
	if err != nil && b.id == 0 { // not even the id was scanned, which is first: the query has failed
		return nil, "", err
	}
	copy(b.sum[:], sum)
	if err == nil && (len(sum) != len(b.sum) || b.size < 0) {
		err = fmt.Errorf("a SHA-256 of %d bytes, a size of %d bytes", len(sum), b.size)
	}
	if err != nil { // a value is not of its column's type, or of a wrong length
		err = fmt.Errorf("%w: %w", errDamaged, err)
	}
	return b, key, err
}

// list returns the first rows of l with keys of [from, to), up to one more than its limit. A folder
// costs one query, whatever the number of keys in it.
func (sh *shard) list(l listing, from, to string) ([]listed, error) {
	if err := sh.batcher.settle(allKeys); err != nil {
		return nil, err
	}
	var page []listed
	isAgain := false
	for len(page) <= l.limit {
		now := sh.store.now().UnixMilli()
		left := l.limit + 1 - len(page)
		rows, err := sh.pageStmt.Query(from, to, now, left)
		if err != nil {
			return nil, sh.noteReadError(err)
		}
		some, next, err := scanToFolder(rows, l)
		if isCorrupt(err) && !isAgain {
			isAgain = true
			continue
		}
		if err != nil {
			return nil, sh.noteReadError(err)
		}
		page = append(page, some...)
		if next == "" {
			break
		}
		from = next
	}
	return page, nil
}

// scanToFolder returns the listing's rows up to the first folder, and closes rows. next is where
// the keys behind that folder begin, or "" if there was no folder.
func scanToFolder(rows *sql.Rows, l listing) (page []listed, next string, err error) {
	defer rows.Close()
	for rows.Next() {
		b, key, err := scanBlob(rows)
		if errors.Is(err, errDamaged) {
			err = fmt.Errorf("key %q: %w", key, err)
		}
		if err != nil {
			return nil, "", err
		}
		folder := l.folderOf(key)
		if folder != "" {
			page = append(page, listed{Key: folder})
			return page, folder + afterPrefix, nil
		}
		page = append(page, b.row(key))
	}
	return page, "", rows.Err()
}

// row returns b's row of a listing.
func (b *blob) row(key string) listed {
	etag, _ := b.etags()
	return listed{
		Key:         key,
		Size:        b.size,
		ContentType: b.contentType,
		ETag:        etag,
		Created:     stamp(b.created),
		Updated:     stamp(b.updated),
		Version:     b.version,
		Expires:     stamp(b.expires),
	}
}

// hasPrefix reports whether a committed blob's key begins with prefix.
func (sh *shard) hasPrefix(prefix string) bool {
	now := sh.store.now().UnixMilli()
	_, _, err := scanBlob(sh.pageStmt.QueryRow(prefix, prefix+afterPrefix, now, 1))
	return err == nil
}

// ==== Writes =====================================================================================
// Receiving a content and queueing its write. Request goroutines run this. A write returns once it
// is committed, in async mode once it is queued.

type putOptions struct {
	contentType string
	length      int64         // of the body as announced, a hint; 0 or -1 if unknown
	ttl         time.Duration // 0: none
	conditions  conditions
	copyOf      *blob                  // its times, expiry and version are kept; nil: the blob is new
	verify      func(sum []byte) error // decides on the SHA-256 of the body once that is read
}

// put stores body under key. It returns a blob of which sum, size and expires are set, and whether
// the write is only queued. After an error readers see what was there before.
func (sh *shard) put(key string, body io.Reader, p *putOptions) (*blob, bool, error) {
	if err := sh.precheck(key, p.conditions); err != nil {
		return nil, false, err
	}
	b := &blob{contentType: p.contentType}
	isQueued, err := sh.receiveAndWrite(key, body, b, p)
	isHeld := b.id != 0      // by upload
	if isHeld && !isQueued { // else finish releases it
		sh.release(b.id)
	}
	return b, isQueued, err
}

func (sh *shard) receiveAndWrite(key string, body io.Reader, b *blob, p *putOptions) (
	isQueued bool, err error) {
	if err := sh.receive(body, b, p); err != nil {
		return false, err
	}
	if p.ttl != 0 {
		b.expires = sh.store.now().Add(p.ttl).UnixMilli()
	}
	return sh.write(sh.putOp(key, b, p), p.conditions)
}

// receive reads body into b: all of it, or the last chunk once the others are stored.
func (sh *shard) receive(body io.Reader, b *blob, p *putOptions) error {
	hash := sha256.New()
	chunks := &chunkReader{body: io.TeeReader(body, hash)}
	first, more, err := chunks.next(p.length)
	if err != nil {
		return err
	}
	packed := b.packFirst(first, sh.store.deflate)
	if more {
		packed, err = sh.upload(chunks, b, packed)
	}
	if err != nil {
		return err
	}
	b.data = packed
	copy(b.sum[:], hash.Sum(nil))
	return p.verify(b.sum[:])
}

// upload stores the chunks of a content of more than one, except the last chunk, which it returns
// packed. The first one is in packed. While the batcher stores a chunk, upload reads the next one
// and packs it. It gives b an id, and holds the content: put releases it.
func (sh *shard) upload(chunks *chunkReader, b *blob, packed []byte) (last []byte, err error) {
	b.id = sh.nextID.Add(1)
	sh.hold(b.id)
	for sequence := int64(0); ; sequence++ {
		o := sh.chunkOp(b.id, sequence, packed)
		if err := sh.submit(o); err != nil {
			return nil, err
		}
		// The batcher has the chunk of this sequence number. Meanwhile the next one is read.
		chunk, more, readErr := chunks.next(-1)
		packed = b.packNext(chunk)
		<-o.done
		if o.err != nil { // first: a full disk is what the client has to hear of
			return nil, o.err
		}
		if readErr != nil {
			return nil, readErr
		}
		if !more {
			return packed, nil
		}
	}
}

// chunkReader cuts a body into chunks. It has two buffers, so that a chunk can be stored while the
// next one is read. It reads one byte more than a chunk, to know whether another one follows.
type chunkReader struct {
	body  io.Reader
	last  []byte // the last chunk, and the byte behind it if there is one
	spare []byte // the chunk before that, which nobody uses any more: the next one goes there
}

// next returns the next chunk, and whether another one follows. The chunk is valid until the second
// call of next after this one. length is a hint, the bytes that the body may have, or -1.
func (c *chunkReader) next(length int64) (chunk []byte, more bool, err error) {
	// The byte behind the last chunk, if there was one, is the first byte of this chunk.
	ahead := c.last[min(len(c.last), chunkSize):]
	buf := bytes.NewBuffer(append(c.spare[:0], ahead...))
	if c.last == nil {
		// Memory follows what has arrived, not what was announced: a client that sends nothing
		// holds 16 KiB at most.
		buf.Grow(int(min(max(length, 0), 16<<10)) + bytes.MinRead)
	} else {
		buf.Grow(chunkSize + bytes.MinRead)
	}
	_, err = buf.ReadFrom(io.LimitReader(c.body, int64(chunkSize+1-buf.Len())))
	c.spare = c.last
	c.last = buf.Bytes()
	chunk = c.last[:min(len(c.last), chunkSize)]
	more = len(c.last) > chunkSize
	return chunk, more, err
}

// remove deletes the blob under key, if there is one and cond holds.
func (sh *shard) remove(key string, cond conditions) (isQueued bool, err error) {
	return sh.write(sh.deleteOp(key, cond), cond)
}

// write queues o and waits for its commit, or, in async mode, returns at once. A request with a
// precondition waits for its outcome.
func (sh *shard) write(o *op, cond conditions) (isQueued bool, err error) {
	o.background = sh.store.async && cond == conditions{} && sh.mayAnswerEarly()
	if err := sh.submit(o); err != nil {
		return false, err
	}
	if o.background {
		return true, nil
	}
	<-o.done
	return false, o.err
}

// mayAnswerEarly reports whether a write may be answered 202. If the disk is full or the shard does
// not recover by itself, async mode is off: its writers must be told.
func (sh *shard) mayAnswerEarly() bool {
	err := sh.currentState()
	isLost := errors.Is(err, errNotSynced) || errors.Is(err, errCorrupt)
	return !isLost && !sh.store.reserve.isDiskFull()
}

// submit queues o once there is room for it. Even the largest operation fits into an empty queue.
func (sh *shard) submit(o *op) error {
	o.since = time.Now()
	o.cost = min(int64(cap(o.data)+len(o.key)+opOverhead), sh.store.maxPending)
	if err := sh.store.acquire(o.cost); err != nil {
		return err
	}
	return sh.batcher.add(o) // it fails only when the store is closed: pending is of no use any more
}

// acquire adds n bytes to pending; finish subtracts them. It returns errBusy if there is no room
// within queueTimeout, and errStopping if it has to wait after a stop. A writer that needs less may
// overtake.
func (st *store) acquire(n int64) error {
	deadline := time.Now().Add(st.queueTimeout)
	for {
		if st.pending.Add(n) <= st.maxPending {
			return nil
		}
		st.pending.Add(-n)
		if time.Now().After(deadline) {
			return errBusy
		}
		select {
		case <-st.stopping.Done():
			return errStopping
		case <-time.After(5 * time.Millisecond): // about what a batch takes
		}
	}
}

// ==== Batcher ====================================================================================
// Writes of a shard queue up and are committed in groups by one goroutine. A group is what is
// queued, up to size operations: writers share a commit and its sync, and do not wait for one
// another. A window adds a wait for more, counted from the group's first operation.
//
// The way of a write, and what a crash after each step leaves:
//
//	receive  the body is read, hashed and packed. A large one is stored chunk by chunk, all but
//	         the last: chunks that only an orphan knows, for the sweep
//	queue    the operation waits for its batch. In async mode the client has its 202 now, and a
//	         crash loses the write
//	block    the cache forgets the key: readers see the database
//	BEGIN    the batch runs, each operation with its own result. A crash leaves the old content
//	COMMIT   with durability "full" SQLite syncs the WAL, and only then readers see the new content.
//	         A crash leaves the new content; with "normal", power loss may take it
//	unblock  the cache may have the key again
//	done     the client gets its 201. A chunked content is not in use any more by its upload
//
// Invariants: Operations are committed in the order of add. done is closed exactly once for each,
// after the COMMIT or an error. newest is the last background operation on a key, so whoever waits
// for it has waited for all of them. That is how a read after a 202 sees the write: it needs no
// second copy of the data, no merged view and no version arithmetic. Tried and rejected: a map of
// pending contents for readers, which needs the stored row as well, for its version.

// op is one write and its outcome.
type op struct {
	do         func(*tx) error // runs inside its batch's transaction, on the batcher's goroutine
	key        string          // empty for a chunk
	data       []byte          // the content that do stores
	frees      bool            // a delete: it may use the reserve of a full disk
	contentID  int64           // of the chunked content that do publishes; 0: there is none
	background bool            // answered 202: nobody waits
	urgent     bool            // its batch does not wait for more
	cost       int64           // pending bytes
	since      time.Time       // its request waits
	done       chan struct{}   // closed by the batcher
	err        error           // valid once done is closed
}

type batcher struct {
	size     int
	window   time.Duration        // only run uses it
	stopping <-chan struct{}      // closed when no batch is to wait any more
	commit   func([]*op)          // ends each op, or puts it back
	upkeep   func() time.Duration // runs between two batches; returns when to run again
	wake     chan struct{}        // capacity 1: queue or closed has changed, or an op is urgent
	ended    chan struct{}        // closed by run

	mu     sync.Mutex     // guards what follows
	queue  []*op          // not a channel: the collector would scan all of its buffer
	newest map[string]*op // background operations not yet committed
	closed bool
	stuck  chan struct{} // closed, and replaced, when an attempt to commit fails for a foreign lock
}

// add queues o, unless the batcher is closed. It does not wait: acquire bounds the queue.
func (q *batcher) add(o *op) error {
	o.done = make(chan struct{})
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.closed {
		return errStopping
	}
	q.queue = append(q.queue, o)
	if o.background {
		q.newest[o.key] = o
		q.newest[allKeys] = o
	}
	q.signal()
	return nil
}

func (q *batcher) signal() {
	select {
	case q.wake <- struct{}{}:
	default: // a signal is on its way already
	}
}

// allKeys stands for all keys, none of which is empty. The key of a chunk is empty, too, but a
// chunk is never a background operation.
const allKeys = ""

// settle returns once every background operation on key that was queued before has ended, or with
// errBusy when an attempt to commit failed for another process's lock.
func (q *batcher) settle(key string) error {
	q.mu.Lock()
	stuck := q.stuck
	o := q.newest[key]
	if o != nil {
		o.urgent = true
		q.signal()
	}
	q.mu.Unlock()
	if o == nil {
		return nil
	}
	select {
	case <-o.done:
		return nil
	case <-stuck:
		return errBusy
	}
}

// putBack is called when an attempt to commit has failed, because another process has the lock. It
// puts background operations, which are tried again, back at the queue's front, and wakes who waits
// in settle. It removes and returns the other operations that have waited for a busyTimeout: else
// each of them would wait for an attempt of its own.
func (q *batcher) putBack(again []*op) (late []*op) {
	q.mu.Lock()
	defer q.mu.Unlock()
	close(q.stuck)
	q.stuck = make(chan struct{})
	left := slices.Clone(again)
	for _, o := range q.queue {
		if !o.background && time.Since(o.since) > busyTimeout {
			late = append(late, o)
		} else {
			left = append(left, o)
		}
	}
	q.queue = left
	return late
}

// end tells whoever waits for o that it has ended. commit calls it for each operation.
func (q *batcher) end(o *op) {
	q.mu.Lock()
	for _, key := range []string{o.key, allKeys} {
		if q.newest[key] == o { // it was answered 202
			delete(q.newest, key)
		}
	}
	q.mu.Unlock()
	close(o.done)
}

// depth returns how many operations are queued.
func (q *batcher) depth() int {
	q.mu.Lock()
	defer q.mu.Unlock()
	return len(q.queue)
}

// close commits what is queued and ends run.
func (q *batcher) close() {
	q.mu.Lock()
	q.closed = true
	q.signal()
	q.mu.Unlock()
	<-q.ended
}

// run commits batches until close, and runs upkeep between them. It is the batcher's goroutine.
func (q *batcher) run() {
	defer close(q.ended)
	idle := time.NewTimer(0)
	stopping := q.stopping
	for {
		// Let the writers that are ready add their operations first. Else, on few cores, each batch
		// has one operation. Measured: 1.6 times the writes.
		runtime.Gosched()
		batch, wait, ended := q.take()
		var timeout <-chan time.Time // nil: none
		switch {
		case ended:
			return
		case wait > 0: // the batch is not due: wait below
			timeout = time.After(wait)
		case len(batch) > 0:
			q.commit(batch)
			clear(batch) // the queue's array must not keep contents alive
			// More may be queued: the signal keeps the select from waiting. If upkeep is due, it
			// has its turn all the same: select chooses at random.
			q.signal()
		}
		select {
		case <-q.wake:
		case <-timeout:
		case <-stopping:
			// No batch waits any more. This case does not come again: a nil channel is never ready.
			q.window = 0
			stopping = nil
		case <-idle.C:
			pause := q.upkeep()
			idle.Reset(pause)
		}
	}
}

// take looks at the queue: what is there, up to size operations or batchBytes, is the next batch.
//   - It is due if it is full, something in it is urgent, the window of its first operation is
//     over, or the batcher is closed: take removes it from the queue and returns it.
//   - It is not due: take returns how long to wait.
//   - There is none: take returns nothing, and whether it is over, because the batcher is closed.
func (q *batcher) take() (batch []*op, wait time.Duration, ended bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	n := 0
	length := 0 // bytes
	isDue := q.closed
	for n < len(q.queue) && n < q.size && length < batchBytes {
		length += len(q.queue[n].data) + opOverhead
		isDue = isDue || q.queue[n].urgent
		n++
	}
	isFull := n == q.size || length >= batchBytes
	if n > 0 && !isFull && !isDue {
		wait = time.Until(q.queue[0].since.Add(q.window))
		if wait > 0 {
			return nil, wait, false
		}
	}
	batch = q.queue[:n:n]
	q.queue = q.queue[n:]
	return batch, 0, n == 0 && q.closed
}

// ==== Writer =====================================================================================
// The SQL of writes, on one connection. The statements of a batch are prepared, BEGIN and COMMIT
// too, because database/sql's transactions prepare each statement again. Only the batcher's
// goroutine uses the connection. No request's context comes here: a cancelled one would discard it.
//
// Four levels: runBatch decides what follows a failure, tryAlone repeats an attempt at one
// operation where that helps, tryBatch is one attempt at a batch, and inTransaction is one
// transaction. An attempt may be repeated after any failure: nothing of it is left, because a
// failed COMMIT is rolled back.

// tx is one transaction on a shard's write connection, and lives as long as it. After the first
// statement that fails, err is its error and exec does nothing any more. A function that runs in a
// transaction returns err, or an error of its own: either one rolls back.
type tx struct {
	shard *shard
	err   error
}

// exec runs query and returns how many rows it changed.
func (t *tx) exec(query string, args ...any) (changed int64) {
	if t.err != nil {
		return 0
	}
	statement, err := t.shard.statement(query)
	if err != nil {
		t.err = err
		return 0
	}
	result, err := statement.Exec(args...)
	if err != nil {
		t.err = err
		return 0
	}
	changed, t.err = result.RowsAffected()
	return changed
}

// statement returns query prepared on the write connection.
func (sh *shard) statement(query string) (*sql.Stmt, error) {
	if s := sh.prepared[query]; s != nil {
		return s, nil
	}
	s, err := sh.writer.Prepare(query)
	if err == nil {
		sh.prepared[query] = s
	}
	return s, err
}

// inTransaction runs f in a transaction and commits it, or rolls it back and returns the error. The
// shard's state follows from the outcome.
func (sh *shard) inTransaction(f func(*tx) error) error {
	if sh.syncFailed {
		return errNotSynced
	}
	t := &tx{shard: sh}
	t.exec("BEGIN IMMEDIATE")
	if t.err == nil {
		err := f(t)
		if t.err == nil {
			t.err = err
		}
		t.exec("COMMIT") // does nothing after an error
	}
	if t.err != nil {
		sh.writer.Exec("ROLLBACK") // fails if nothing was begun, or SQLite has rolled back already
	}
	sh.written += sh.pagesWritten() * sh.pageBytes
	return sh.recordOutcome(t.err)
}

// pagesWritten returns how many pages have gone into the WAL since the last call.
func (sh *shard) pagesWritten() (pages int64) {
	conn, err := sh.writer.Conn(context.Background())
	if err != nil {
		return 0 // the next transaction fails, too
	}
	defer conn.Close()
	conn.Raw(func(driverConn any) error {
		n, _, err := driverConn.(sqlite.DBStatus).Status(sqlite.DBStatusCacheWrite, true)
		pages = int64(n)
		return err
	})
	return pages
}

// recordOutcome takes the outcome of a use of the write connection, nil or an error, and returns it
// translated. The outcome becomes the shard's state. Two do not: a full disk, which is the state of
// the store, and the first errCorrupt in a row, which may be only a read that failed: see
// isCorrupt.
func (sh *shard) recordOutcome(err error) error {
	err = sh.explain(err)
	if errors.Is(err, errFull) {
		sh.store.reserve.setFull(err)
		return err
	}
	isDamage := errors.Is(err, errCorrupt)
	isFirst := isDamage && !sh.wasCorrupt
	sh.wasCorrupt = isDamage
	if isFirst {
		return err
	}
	if errors.Is(err, errNotSynced) {
		sh.syncFailed = true
	}
	sh.setState(err)
	return err
}

// explain translates an error of a write or of opening a file, and asks the system for the reason
// that SQLite keeps to itself. A quota and a maximum size of files (ulimit -f) mean the same to a
// client as a full disk.
func (sh *shard) explain(err error) error {
	err = translate(err)
	_, extended := sqliteCode(err)
	if extended != sqlite3.SQLITE_IOERR_WRITE && !errors.Is(err, errCannotOpen) {
		return err
	}
	reason := sh.probeSpace()
	if isNoSpace(reason) {
		return fmt.Errorf("%w: %w: %w", errFull, reason, err)
	}
	if reason != nil {
		return fmt.Errorf("%w: %w", err, reason)
	}
	return err
}

// probeSpace writes 64 KiB into a new file, where the shard's file ends, and returns what the
// system says to that. So a limit to the size of files shows, too.
func (sh *shard) probeSpace() error {
	probe, err := os.CreateTemp(sh.store.dir, "blobnom.probe")
	if err != nil {
		return err
	}
	defer os.Remove(probe.Name())
	defer probe.Close()
	end := max(sizeOf(sh.path), sizeOf(sh.path+"-wal"))
	_, err = probe.WriteAt(make([]byte, 64<<10), end)
	return err
}

// checkpointIfDue copies what the WAL holds into the database once there is enough of it, so that
// the next write can begin the WAL anew. It runs between two batches, when their clients have been
// answered, and after a piece of upkeep. SQLite would do it inside a COMMIT and would not tell of
// an error. While another process reads an old state, only a part is copied, and the WAL grows.
func (sh *shard) checkpointIfDue() {
	isDiskFull := sh.store.reserve.isDiskFull()
	due := int64(checkpointBytes)
	if isDiskFull {
		due = spareBytes // the shards share the reserve's room
	}
	if sh.written-sh.checkpointed < due {
		return
	}
	sh.checkpointed = sh.written
	if sh.syncFailed {
		return
	}
	if isDiskFull {
		sh.truncateWAL()
		return
	}
	var busy, total, copied int64 // 0 or 1, pages of the WAL, pages that are in the database now
	row := sh.writer.QueryRow("PRAGMA wal_checkpoint(PASSIVE)")
	err := row.Scan(&busy, &total, &copied)
	if err != nil { // without one it may have done nothing, which does not make the shard ready
		sh.recordOutcome(err)
	}
	if copied < total { // a reader was in the way: try again soon, else the WAL grows without end
		sh.checkpointed -= due - due/8
	}
}

// truncateWAL copies the WAL into the database and empties it, unless a reader is in the way. The
// database may grow by the size of the WAL before the WAL shrinks. On a full disk the reserve has
// room for one shard that does this, hence the lock.
func (sh *shard) truncateWAL() error {
	if sh.syncFailed {
		return errNotSynced
	}
	// No wait for a reader: the next attempt is soon, and other shards wait for the lock.
	sh.store.reserve.mu.Lock()
	_, err := sh.writer.Exec("PRAGMA busy_timeout = 0; PRAGMA wal_checkpoint(TRUNCATE)")
	sh.store.reserve.mu.Unlock()
	_, resetErr := sh.writer.Exec(fmt.Sprintf("PRAGMA busy_timeout = %d", busyTimeout.Milliseconds()))
	if err == nil {
		err = resetErr
	}
	if err == nil { // perhaps it has done nothing, which does not make the shard ready
		return nil
	}
	return sh.recordOutcome(err)
}

// commit is the batcher's: it runs a batch, and a checkpoint when that is due.
func (sh *shard) commit(batch []*op) {
	sh.runBatch(batch)
	sh.checkpointIfDue()
}

// runBatch commits the operations of batch, or finishes them with their errors, or postpones them.
func (sh *shard) runBatch(batch []*op) {
	if len(batch) > 1 {
		err := sh.tryBatch(batch)
		if errors.Is(err, errBusy) {
			sh.postpone(batch, err)
			return
		}
		if err == nil {
			for _, o := range batch {
				sh.finish(o, nil)
			}
			return
		}
	}
	// Each alone, so that a bad one fails alone.
	for i := range batch {
		err := sh.tryAlone(batch[i : i+1])
		if errors.Is(err, errBusy) { // those behind it must not overtake it
			sh.postpone(batch[i:], err)
			return
		}
		sh.finish(batch[i], err)
	}
}

// postpone puts back the operations that were answered 202, because another process has locked the
// shard: they are tried until they are in, or until drainTimeout after a stop. It finishes the
// others with err, an errBusy, and also those in the queue that have waited for long.
func (sh *shard) postpone(batch []*op, err error) {
	var again []*op
	mayRetry := !sh.store.isOverdue.Load()
	for _, o := range batch {
		if mayRetry && o.background {
			again = append(again, o)
		} else {
			sh.finish(o, err)
		}
	}
	for _, o := range sh.batcher.putBack(again) {
		sh.finish(o, err)
	}
}

// tryAlone is an attempt at a batch of one operation. It repeats an attempt that found the file
// damaged, because perhaps only a read failed, and a delete that found the disk full: a delete
// frees more than it takes.
func (sh *shard) tryAlone(batch []*op) error {
	err := sh.tryBatch(batch)
	if isCorrupt(err) {
		return sh.tryBatch(batch)
	}
	if !batch[0].frees || !errors.Is(err, errFull) {
		return err
	}
	sh.store.reserve.giveUp()
	err = sh.tryBatch(batch)
	if !errors.Is(err, errFull) {
		return err
	}
	err = sh.truncateWAL() // the room of the reserve was not enough, or others have taken it
	if err != nil {
		return err
	}
	return sh.tryBatch(batch)
}

// tryBatch runs batch as one transaction. An operation whose precondition fails changes nothing:
// its error stays in its op, and the batch goes on.
func (sh *shard) tryBatch(batch []*op) error {
	takesRoom := func(o *op) bool { return !o.frees }
	if sh.store.reserve.isDiskFull() && slices.ContainsFunc(batch, takesRoom) {
		return errFull // only deletes may use what room there is
	}
	for _, o := range batch {
		if o.key != "" {
			sh.cache.block(o.key)
		}
	}
	start := time.Now()
	if err := sh.setSyncLevel(batch); err != nil {
		return sh.recordOutcome(err)
	}
	err := sh.inTransaction(func(t *tx) error {
		for _, o := range batch {
			o.err = o.do(t)
			if o.err != nil && !errors.Is(o.err, errCondition) {
				return o.err
			}
		}
		return t.err
	})
	sh.store.batches.Add(1)
	sh.store.operations.Add(int64(len(batch)))
	sh.store.commitNanos.Add(int64(time.Since(start)))
	return err
}

// setSyncLevel lets a batch that has only chunks be committed without a sync. Nothing refers to
// them before their content is published. The commit that publishes it syncs the WAL, with all that
// is before it in the WAL, and a checkpoint syncs the WAL before it copies. So power loss takes a
// chunk only together with its publication, and a large content is synced once.
func (sh *shard) setSyncLevel(batch []*op) error {
	level := sh.durability
	hasKey := func(o *op) bool { return o.key != "" }
	if level == "full" && !slices.ContainsFunc(batch, hasKey) {
		level = "normal"
	}
	if level == sh.syncLevel {
		return nil
	}
	// This PRAGMA acts when it is prepared: a statement that is kept would do nothing.
	_, err := sh.writer.Exec("PRAGMA synchronous = " + level)
	if err == nil {
		sh.syncLevel = level
	}
	return err
}

// finish ends one operation of a batch that failed with err, or was committed if err is nil.
func (sh *shard) finish(o *op, err error) {
	if err != nil {
		o.err = err
	}
	if o.key != "" {
		sh.cache.unblock(o.key)
	}
	if o.background && o.contentID != 0 { // else put releases it
		sh.release(o.contentID)
	}
	if o.err != nil && o.background {
		sh.failedWrites.Add(1)
		sh.store.log.Error("a write that was answered 202 failed",
			"key", o.key, "shard", sh.index, "error", o.err)
	}
	sh.store.pending.Add(-o.cost)
	sh.batcher.end(o)
}

const (
	// On a conflict the row that is there keeps its id and its created_at. It is changed only if it
	// has no chunks, because its size is at most the last parameter, chunkSize, and if neither it
	// nor the new one expires. Else nothing is changed.
	upsertQuery = `INSERT INTO blobs (id, key, size, sha256, codec, stored, crc32, content_type,
		created_at, updated_at, expires_at, version, data)
		VALUES (?, ?, ?, ?, ?, ?, nullif(?, 0), ?, ?, ?, nullif(?, 0), ?, ?)
		ON CONFLICT (key) DO UPDATE SET size = excluded.size, sha256 = excluded.sha256,
		codec = excluded.codec, stored = excluded.stored, crc32 = excluded.crc32,
		content_type = excluded.content_type, updated_at = excluded.updated_at,
		version = version + 1, data = excluded.data
		WHERE size <= ? AND expires_at IS NULL AND excluded.expires_at IS NULL`

	deleteQuery   = `DELETE FROM blobs WHERE id = ?`
	chunkQuery    = `INSERT INTO chunks (id, data) VALUES (?, ?)`
	orphanQuery   = `INSERT OR IGNORE INTO orphans (id) VALUES (?)`
	unorphanQuery = `DELETE FROM orphans WHERE id = ?`
)

// putOp returns the operation that stores b under key, unless p's conditions refuse it. All chunks
// of b but the last are in place.
func (sh *shard) putOp(key string, b *blob, p *putOptions) *op {
	do := func(t *tx) error { return t.putBlob(key, b, p) }
	return &op{key: key, data: b.data, contentID: b.id, do: do}
}

// deleteOp returns the operation that deletes the blob under key, if there is one and cond holds.
func (sh *shard) deleteOp(key string, cond conditions) *op {
	do := func(t *tx) error {
		_, err := t.vacate(key, sh.store.now().UnixMilli(), cond)
		return err
	}
	return &op{key: key, frees: true, do: do}
}

// chunkOp returns the operation that stores one chunk of a content that is being uploaded.
func (sh *shard) chunkOp(contentID, sequence int64, data []byte) *op {
	do := func(t *tx) error {
		if sequence == 0 { // else a crash could leave chunks that nothing refers to
			t.exec(orphanQuery, contentID)
		}
		t.exec(chunkQuery, contentID<<seqBits|sequence, data)
		return t.err
	}
	return &op{data: data, urgent: true, do: do}
}

// putBlob makes b the content of key. What was there goes with the same transaction.
func (t *tx) putBlob(key string, b *blob, p *putOptions) error {
	now := t.shard.store.now().UnixMilli()
	row := *b
	row.created = now
	row.updated = now
	if !b.chunked() {
		row.id = t.shard.nextID.Add(1)
		// The first way: one statement. A row that it replaces keeps its id. This does for nearly
		// all writes, which would take 10 % longer in the second way.
		if p.copyOf == nil && p.conditions == (conditions{}) {
			isStored := t.upsert(key, &row)
			if isStored || t.err != nil {
				return t.err
			}
		}
	}
	// The second way: the old row is deleted, and a new one made.
	replaced, err := t.vacate(key, now, p.conditions)
	if err != nil {
		return err
	}
	if replaced != nil {
		row.created = replaced.created
		row.version = replaced.version + 1
	}
	if original := p.copyOf; original != nil {
		row.created = original.created
		row.updated = original.updated
		row.expires = original.expires
		row.version = original.version
	}
	if b.chunked() {
		row.data = nil
		t.exec(chunkQuery, b.id<<seqBits|b.lastSeq(), b.data)
		t.exec(unorphanQuery, b.id)
	}
	t.upsert(key, &row) // vacate has deleted what could be in its way
	return t.err
}

// upsert makes the row of key, or replaces a row without chunks, if neither of the two expires: so
// it need not change the index of expiry. Over any other row it does nothing and returns false.
func (t *tx) upsert(key string, b *blob) bool {
	changed := t.exec(upsertQuery, b.id, key, b.size, b.sum[:], b.deflated, b.stored, b.crc,
		b.contentType, b.created, b.updated, b.expires, b.version, b.data, chunkSize)
	return changed == 1
}

// vacate deletes the row of key, if there is one and cond holds, and hands its chunks to the sweep.
// It returns the blob that was there and had not expired, or nil. vacate decides cond: it sees what
// earlier operations of the batch did, and no other writer exists.
func (t *tx) vacate(key string, now int64, cond conditions) (*blob, error) {
	old, _, err := scanBlob(t.shard.findStmt.QueryRow(key, false))
	if errors.Is(err, errNoBlob) {
		return nil, cond.refuse(nil)
	}
	isDamaged := errors.Is(err, errDamaged)
	if err != nil && !isDamaged { // a damaged row can be replaced and deleted
		return nil, err
	}
	live := old // as the conditions see it
	if old.expired(now) {
		live = nil
	}
	if err := cond.refuse(live); err != nil {
		return nil, err
	}
	t.deleteRow(old)
	if isDamaged { // its size may be wrong: perhaps it has chunks
		t.exec(orphanQuery, old.id)
	}
	return live, t.err
}

// deleteRow deletes the row of b, and hands its chunks to the sweep.
func (t *tx) deleteRow(b *blob) {
	t.exec(deleteQuery, b.id)
	if b.chunked() {
		t.exec(orphanQuery, b.id)
	}
}

// ==== Codec ======================================================================================
// A content is stored as it is or deflated, chunk by chunk. Each deflated chunk has a dictionary of
// its own and ends with a sync flush, so that it can be inflated alone. A gzip header, all the
// chunks, an empty block, checksum and size are one gzip member: it is sent to clients that accept
// gzip, with nothing compressed anew. Other contents are deflated on their way out. Request
// goroutines run this. They hold a deflater, nearly 1 MiB of memory, for one chunk, and never while
// they wait for a client.

var deflaters = sync.Pool{New: func() any {
	w, _ := flate.NewWriter(nil, flate.BestSpeed) // level 5 takes three times as long for a sixth less
	return w
}}

// deflate returns chunk deflated, a few bytes longer if it does not shrink.
func deflate(chunk []byte) []byte {
	w := deflaters.Get().(*flate.Writer)
	defer deflaters.Put(w)
	out := bytes.NewBuffer(make([]byte, 0, len(chunk)/2))
	w.Reset(out)
	w.Write(chunk) // a buffer takes everything
	w.Flush()
	return out.Bytes()
}

// inflate returns the size bytes that were deflated to data, or an errDamaged.
func inflate(data []byte, size int64) ([]byte, error) {
	reader := flate.NewReader(bytes.NewReader(data))
	out := make([]byte, size+1)      // one byte more than there must be
	n, _ := io.ReadFull(reader, out) // an error is normal: data has no final block; n tells enough
	if int64(n) != size {
		return nil, fmt.Errorf("%w: inflated to %d bytes instead of %d", errDamaged, n, size)
	}
	return out[:size], nil
}

// isWorthwhile reports whether deflating chunk to data saved enough: an eighth.
func isWorthwhile(chunk, data []byte) bool { return len(data) <= len(chunk)-len(chunk)/8 }

// isPromising reports whether deflating a chunk is worth a try. 4 KiB from its middle tell that in
// 50 µs.
func isPromising(chunk []byte) bool {
	if len(chunk) < minDeflate {
		return false
	}
	if len(chunk) <= 8<<10 {
		return true
	}
	sample := chunk[len(chunk)/2:][:4<<10]
	return isWorthwhile(sample, deflate(sample))
}

// packFirst returns the first chunk of b as it will be stored. It decides whether b is deflated.
func (b *blob) packFirst(chunk []byte, mayDeflate bool) []byte {
	if mayDeflate && isPromising(chunk) {
		data := deflate(chunk)
		if isWorthwhile(chunk, data) {
			b.deflated = true
			b.count(chunk, data)
			return data
		}
	}
	b.count(chunk, chunk)
	return chunk
}

// packNext returns another chunk of b as it will be stored.
func (b *blob) packNext(chunk []byte) []byte {
	data := chunk
	if b.deflated {
		data = deflate(chunk)
	}
	b.count(chunk, data)
	return data
}

// count adds a chunk, stored as data, to the sizes and the checksum of b.
func (b *blob) count(chunk, data []byte) {
	b.crc = crc32.Update(b.crc, crc32.IEEETable, chunk)
	b.size += int64(len(chunk))
	b.stored += int64(len(data))
}

// What a gzip member has around deflated chunks. It ends with eight bytes of checksum and size.
const (
	gzipHeader   = "\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\xff"
	gzipEnd      = "\x03\x00"
	gzipOverhead = int64(len(gzipHeader) + len(gzipEnd) + 8)
)

// ==== Cache ======================================================================================
// Small committed contents in memory.

// cache maps keys to committed small blobs, at most limit bytes of them. The shard's one writer
// removes and blocks the keys of a batch before its transaction, and unblocks them after the COMMIT
// and before anybody is told. A reader notes the generation before it reads a row, and puts the row
// only if the generation is the same, and the key not blocked. So nothing gets in that a commit may
// have replaced, and while a transaction may change a key, its readers see the database. Arbitrary
// entries are evicted: there is nothing to maintain on a hit.
type cache struct {
	limit      int
	mu         sync.Mutex // guards the rest
	bytes      int
	entries    map[string]*blob
	blocked    map[string]bool
	generation int64 // counts calls of unblock
}

// get returns the committed blob under key, nil if it is not at hand, and the generation.
func (c *cache) get(key string) (*blob, int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.entries[key], c.generation
}

// put adds b, which was read after get returned generation, if it is small.
func (c *cache) put(key string, b *blob, generation int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	needed := entryBytes(key, b)
	if b.size > cacheItem || needed > c.limit {
		return
	}
	if c.generation != generation || c.blocked[key] {
		return
	}
	c.remove(key) // another reader's
	for evicted := range c.entries {
		if c.bytes+needed <= c.limit {
			break
		}
		c.remove(evicted)
	}
	c.bytes += needed
	c.entries[key] = b
}

// cacheLimit returns the maximum of the cache in bytes, over all shards. It is an eighth of a limit
// of Go's memory, at most cacheBytes: uploads and the collector need most of the memory.
func cacheLimit() int {
	const current = -1 // asks for the limit
	return int(min(cacheBytes, debug.SetMemoryLimit(current)/8))
}

// block forgets key and keeps readers from putting it until unblock.
func (c *cache) block(key string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.remove(key)
	c.blocked[key] = true
}

// unblock lets readers put key again.
func (c *cache) unblock(key string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.blocked, key)
	c.generation++
}

// remove forgets key. c.mu is held.
func (c *cache) remove(key string) {
	if b := c.entries[key]; b != nil {
		c.bytes -= entryBytes(key, b)
		delete(c.entries, key)
	}
}

// entryBytes is about what an entry holds. Blob, header and the map's share come to 600 bytes.
func entryBytes(key string, b *blob) int { return len(key) + len(b.data) + len(b.contentType) + 600 }

// ==== Reader =====================================================================================
// The position of one download.

// blobReader reads a blob for one request. Of a chunked blob it has one chunk in memory and takes
// the next by a query of its own, so that a slow client holds neither a connection nor a
// transaction. It is an io.ReadSeeker for http.ServeContent.
type blobReader struct {
	shard    *shard // nil: the blob is in a source
	dataStmt *sql.Stmt
	blob     *blob

	zipped    bool   // read it as one gzip member
	next      int64  // sequence number of the next chunk
	skip      int64  // bytes of the next chunk before the position
	unread    []byte // loaded and not yet read; it may be the cache's: not to be changed
	stored    int64  // bytes of the chunks so far, as they are stored; for a source
	crc       uint32 // of the chunks so far, as the client sees them: see decode
	isPartial bool   // it does not begin with the first chunk
}

// chunkData takes the data of a chunk from a row, without a copy. The driver allocates it for each
// row, and database/sql lets its memory be kept, because no other Scan of the row follows.
type chunkData []byte

func (c *chunkData) Scan(value any) error {
	*c, _ = value.([]byte) // an empty one is nil
	return nil
}

func (br *blobReader) close() {
	if br.blob.chunked() { // see lookUp
		br.shard.release(br.blob.id)
	}
}

// Seek supports what http.ServeContent needs: any offset from the start, and the end, from which it
// learns the size. The size of a gzip member is not known. The largest number will do: ServeContent
// copies to the end, and sets no Content-Length for an encoded answer.
func (br *blobReader) Seek(offset int64, whence int) (int64, error) {
	if whence == io.SeekEnd && br.zipped {
		return math.MaxInt64, nil
	}
	if whence == io.SeekEnd {
		return br.blob.size, nil
	}
	br.crc = 0
	br.next = offset / chunkSize
	br.isPartial = br.next > 0
	br.skip = offset % chunkSize
	br.unread = nil
	return offset, nil
}

func (br *blobReader) Read(p []byte) (int, error) {
	if len(br.unread) == 0 {
		if br.next > br.blob.lastSeq() {
			return 0, io.EOF
		}
		if err := br.load(); err != nil {
			return 0, err
		}
	}
	n := copy(p, br.unread)
	br.unread = br.unread[n:]
	return n, nil
}

// WriteTo writes the rest of the blob chunk by chunk, first what is loaded, without another buffer.
func (br *blobReader) WriteTo(w io.Writer) (n int64, err error) {
	for {
		written, err := w.Write(br.unread)
		n += int64(written)
		br.unread = nil
		if err != nil || br.next > br.blob.lastSeq() {
			return n, err
		}
		if err := br.load(); err != nil {
			return n, err
		}
	}
}

// load makes the next chunk the unread one.
func (br *blobReader) load() error {
	data, err := br.fetch()
	if err == nil {
		data, err = br.decode(data)
	}
	if err != nil && br.shard == nil {
		return translate(err)
	}
	if err != nil {
		return br.shard.noteReadError(err)
	}
	br.unread = data[br.skip:]
	br.skip = 0
	br.next++
	return nil
}

// chunkLen returns the length of the next chunk, as the client sees it.
func (br *blobReader) chunkLen() int64 {
	return min(chunkSize, br.blob.size-br.next*chunkSize)
}

// fetch returns the next chunk as it is stored. It fails if there is none or its length is wrong: a
// download is whole or visibly cut.
func (br *blobReader) fetch() ([]byte, error) {
	b := br.blob
	data := chunkData(b.data)
	if b.chunked() {
		id := b.id<<seqBits | br.next
		err := br.dataStmt.QueryRow(id).Scan(&data)
		if isCorrupt(err) {
			err = br.dataStmt.QueryRow(id).Scan(&data)
		}
		if errors.Is(err, sql.ErrNoRows) {
			const text = "%w: chunk %d of content %d is missing"
			return nil, fmt.Errorf(text, errDamaged, br.next, b.id)
		}
		if err != nil {
			return nil, err
		}
	}
	size := int64(len(data))
	isWrong := false
	if !b.deflated {
		isWrong = size != br.chunkLen()
	} else if !b.chunked() { // else no row has the length: inflate or the client finds out
		isWrong = size != b.stored
	}
	if isWrong {
		const text = "%w: chunk %d of content %d has %d bytes"
		return nil, fmt.Errorf(text, errDamaged, br.next, b.id, size)
	}
	br.stored += size
	return data, nil
}

// decode turns data, the next chunk as it is stored, into what is sent.
func (br *blobReader) decode(data []byte) ([]byte, error) {
	b := br.blob
	if br.zipped && b.deflated {
		br.crc = b.crc // it goes behind the last chunk: nothing is inflated, and so nothing summed
		return br.gzipPiece(data), nil
	}
	if b.deflated {
		var err error
		data, err = inflate(data, br.chunkLen())
		if err != nil {
			return nil, err
		}
	}
	// lookUp has verified a small content that is stored and sent as it is.
	if b.chunked() || b.deflated || br.zipped {
		if err := br.verify(data); err != nil {
			return nil, err
		}
	}
	if br.zipped {
		return br.gzipPiece(deflate(data)), nil
	}
	return data, nil
}

// verify compares the checksum, if it is known, of a content that is read as a whole, before its
// last chunk is sent: a damaged content is not taken for a whole one. A checksum costs 30 µs a MiB,
// a SHA-256 600.
func (br *blobReader) verify(data []byte) error {
	br.crc = crc32.Update(br.crc, crc32.IEEETable, data)
	isLast := br.next == br.blob.lastSeq()
	if isLast && !br.isPartial {
		return br.blob.compare(br.crc)
	}
	return nil
}

// compare returns an errDamaged if crc is not the checksum of b's content.
func (b *blob) compare(crc uint32) error {
	if b.crc != 0 && b.crc != crc {
		return fmt.Errorf("%w: its CRC-32 is %08x, not %08x", errDamaged, crc, b.crc)
	}
	return nil
}

// gzipPiece returns what the next chunk, deflated to data, contributes to the gzip member.
func (br *blobReader) gzipPiece(data []byte) (piece []byte) {
	b := br.blob
	if br.next == 0 {
		piece = []byte(gzipHeader)
	}
	piece = append(piece, data...)
	if br.next == b.lastSeq() {
		piece = append(piece, gzipEnd...)
		piece = binary.LittleEndian.AppendUint32(piece, br.crc)
		piece = binary.LittleEndian.AppendUint32(piece, uint32(b.size))
	}
	return piece
}

// ==== Metrics ====================================================================================
// What the server does, in the text format of Prometheus. Labels are bounded: routes, known
// methods, status codes, shards. A scrape counts a shard's blobs at most once a minute.

// durationBounds are the upper bounds of the histogram in seconds: from a cached GET to
// drainTimeout, and one for what takes longer, such as a large upload.
var durationBounds = [...]float64{
	.0001, .00025, .0005, .001, .0025, .005, .01, .025, .05,
	.1, .25, .5, 1, 2.5, 5, 10, 15, math.Inf(1),
}

// histogram counts durations: each count is of those up to its bound and above the bound before it.
type histogram struct {
	counts [len(durationBounds)]int64
	sum    float64 // seconds
}

// routeMethod and requestKind are the labels of a request. They become text only at a scrape.
type routeMethod struct{ route, method string }

type requestKind struct {
	routeMethod
	status int // 0: the request was cut off
}

// metrics are the counts of requests. Any goroutine may use them.
type metrics struct {
	mu        sync.Mutex // guards the other fields
	requests  map[requestKind]int64
	durations map[routeMethod]histogram
	received  int64 // bytes of uploaded bodies
	sent      int64 // bytes of answered bodies
}

func newMetrics() *metrics {
	return &metrics{requests: map[requestKind]int64{}, durations: map[routeMethod]histogram{}}
}

// observe counts one request. Its w.status is 0 if it was cut off.
func (m *metrics) observe(w *response, r *http.Request, took time.Duration) {
	labels := routeMethod{routeOf(r), "other"}
	switch r.Method {
	case http.MethodGet, http.MethodHead, http.MethodPut, http.MethodPost, http.MethodDelete,
		http.MethodOptions:
		labels.method = r.Method
	}
	bucket, _ := slices.BinarySearch(durationBounds[:], took.Seconds())
	m.mu.Lock()
	defer m.mu.Unlock()
	m.requests[requestKind{labels, w.status}]++
	h := m.durations[labels]
	h.counts[bucket]++
	h.sum += took.Seconds()
	m.durations[labels] = h
	m.received += w.received
	m.sent += w.sent
}

// routeOf returns the path of the pattern of r, which may follow a method. OPTIONS and a path that
// is refused have no pattern.
func routeOf(r *http.Request) string {
	if r.Pattern == "" {
		return "none"
	}
	return r.Pattern[strings.Index(r.Pattern, "/"):]
}

func (s *server) exposeMetrics(w *response, _ *http.Request) error {
	text := new(bytes.Buffer)
	s.metrics.write(text)
	s.store.writeMetrics(text)
	s.store.writeShardMetrics(text)
	writeProcessMetrics(text)
	return writeBody(w, http.StatusOK, "text/plain; version=0.0.4; charset=utf-8", text.Bytes())
}

// metric has one value, a number, and no labels.
type metric struct {
	name, help string
	value      any
}

func writeMetrics(text io.Writer, metrics []metric) {
	for _, m := range metrics {
		writeHelp(text, m.name, m.help)
		fmt.Fprintln(text, m.name, m.value)
	}
}

// writeHelp begins a metric. A name that ends in _total is a counter.
func writeHelp(text io.Writer, name, help string) {
	kind := "gauge"
	if strings.HasSuffix(name, "_total") {
		kind = "counter"
	}
	fmt.Fprintf(text, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, kind)
}

func (m *metrics) write(text io.Writer) {
	m.mu.Lock()
	defer m.mu.Unlock()
	const requests = "blobnom_http_requests_total"
	writeHelp(text, requests, "Requests by route, method and status code; code 0 was cut off.")
	for kind, count := range m.requests {
		const line = "%s{route=%q,method=%q,code=\"%d\"} %d\n"
		fmt.Fprintf(text, line, requests, kind.route, kind.method, kind.status, count)
	}
	const duration = "blobnom_http_request_duration_seconds"
	const help = "Time from a request's header to the end of its answer."
	fmt.Fprintf(text, "# HELP %s %s\n# TYPE %s histogram\n", duration, help, duration)
	for key, h := range m.durations {
		labels := fmt.Sprintf("route=%q,method=%q", key.route, key.method)
		total := int64(0) // of all durations up to the bound
		for i, bound := range durationBounds {
			total += h.counts[i]
			fmt.Fprintf(text, "%s_bucket{%s,le=\"%v\"} %d\n", duration, labels, bound, total)
		}
		fmt.Fprintf(text, "%s_sum{%s} %g\n", duration, labels, h.sum)
		fmt.Fprintf(text, "%s_count{%s} %d\n", duration, labels, total)
	}
	writeMetrics(text, []metric{
		{"blobnom_http_received_bytes_total", "Bytes of uploaded bodies.", m.received},
		{"blobnom_http_sent_bytes_total", "Bytes of answered bodies.", m.sent},
	})
}

func (st *store) writeMetrics(text io.Writer) {
	seconds := float64(st.commitNanos.Load()) / 1e9
	var disk syscall.Statfs_t
	syscall.Statfs(st.dir, &disk)
	free := int64(disk.Bavail) * int64(disk.Bsize)
	writeMetrics(text, []metric{
		{"blobnom_batches_total", "Transactions of writes, failed ones too.", st.batches.Load()},
		{"blobnom_batch_operations_total", "Writes in transactions.", st.operations.Load()},
		{"blobnom_commit_seconds_total", "Time that transactions took.", seconds},
		{"blobnom_queue_bytes", "Bytes of writes queued or being committed.", st.pending.Load()},
		{"blobnom_disk_free_bytes", "Free bytes of the data's disk.", free},
	})
}

// writeShardMetrics writes a sample per shard. A shard that could not be opened has only the first.
func (st *store) writeShardMetrics(text io.Writer) {
	const ready = "blobnom_shard_ready"
	isReady := func(sh *shard) int64 {
		if sh.health() != nil {
			return 0
		}
		return 1
	}
	queued := func(sh *shard) int64 { return int64(sh.batcher.depth()) }
	failed := func(sh *shard) int64 { return sh.failedWrites.Load() }
	fileBytes := func(sh *shard) int64 { return max(0, sizeOf(sh.path)) }
	walBytes := func(sh *shard) int64 { return max(0, sizeOf(sh.path+"-wal")) }
	for _, m := range []struct {
		name, help string
		value      func(*shard) int64
	}{
		{ready, "1 if the shard is ready, else 0, as /readyz.", isReady},
		{"blobnom_queue_operations", "Queued writes.", queued},
		{"blobnom_failed_background_writes_total", "Writes that failed after a 202.", failed},
		{"blobnom_shard_blobs", "Blobs, expired ones too, at most a minute ago.", (*shard).blobs},
		{"blobnom_shard_file_bytes", "Size of the database file.", fileBytes},
		{"blobnom_shard_wal_bytes", "Size of the write-ahead log.", walBytes},
	} {
		writeHelp(text, m.name, m.help)
		for _, sh := range st.shards {
			if sh.broken == nil || m.name == ready {
				fmt.Fprintf(text, "%s{shard=\"%d\"} %d\n", m.name, sh.index, m.value(sh))
			}
		}
	}
}

// blobs counts the shard's blobs, at most once a minute: that reads the whole index of keys. After
// an error it returns the last count.
func (sh *shard) blobs() int64 {
	sh.countMu.Lock()
	defer sh.countMu.Unlock()
	if time.Since(sh.counted) > time.Minute {
		sh.counted = time.Now()
		row := sh.readers.QueryRow("SELECT count(*) FROM blobs")
		row.Scan(&sh.count) // after an error the last count stays
	}
	return sh.count
}

var processStart = time.Now()

// writeProcessMetrics writes the standard metrics of a process and of Go, and the build's. Two of
// them only Linux tells.
func writeProcessMetrics(text io.Writer) {
	start := float64(processStart.UnixMilli()) / 1e3
	var usage syscall.Rusage
	syscall.Getrusage(syscall.RUSAGE_SELF, &usage)
	seconds := float64(usage.Utime.Nano()+usage.Stime.Nano()) / 1e9
	var files syscall.Rlimit
	syscall.Getrlimit(syscall.RLIMIT_NOFILE, &files)
	var memory runtime.MemStats
	runtime.ReadMemStats(&memory)
	writeMetrics(text, []metric{
		{"process_start_time_seconds", "Start time since the Unix epoch in seconds.", start},
		{"process_cpu_seconds_total", "User and system CPU time in seconds.", seconds},
		{"process_max_fds", "Maximum number of open file descriptors.", files.Cur},
		{"go_goroutines", "Goroutines that exist.", runtime.NumGoroutine()},
		{"go_memstats_heap_alloc_bytes", "Bytes of heap objects.", memory.HeapAlloc},
		{"go_memstats_sys_bytes", "Bytes obtained from the system.", memory.Sys},
	})
	open, err := os.ReadDir("/proc/self/fd")
	if err == nil {
		count := len(open) - 1 // without the one that reads the directory
		statm, _ := os.ReadFile("/proc/self/statm")
		var virtual, resident int // pages
		fmt.Sscan(string(statm), &virtual, &resident)
		resident *= os.Getpagesize()
		writeMetrics(text, []metric{
			{"process_open_fds", "Number of open file descriptors.", count},
			{"process_resident_memory_bytes", "Resident memory in bytes.", resident},
		})
	}
	const build = "blobnom_build_info"
	writeHelp(text, build, "Constant 1; the labels tell the version.")
	fmt.Fprintf(text, "%s{version=%q,goversion=%q} 1\n", build, version(), runtime.Version())
}

// ==== Upkeep =====================================================================================
// Between two batches, once a second, each batcher's goroutine looks after its shard. It tests
// whether the shard can be written to, so that a shard is ready again without a client's write. It
// deletes blobs that have expired and contents that nobody refers to or reads, and returns free
// pages to the file system. It does a small piece at a time, and pauses as long as the piece took.
//
// It also keeps the reserve, a file that makes a full disk survivable. A delete has to write to the
// WAL, and the WAL gives its space back only once all of it is copied into the database, which may
// have to grow for that. Once a write has found the disk full, others are refused. The first delete
// or piece of upkeep that finds it full removes the reserve, which is larger than a shard's WAL:
// that is room for deletes and checkpoints. Writes work again when the reserve is back, and there
// is some room besides it.

const (
	vacuumPages  = 256     // freed in one step; fewer are not worth a step
	expireAtOnce = 64      // rows, deleted within some milliseconds
	chunksAtOnce = 8       // chunks of an orphan: 2 MiB of pages
	spareBytes   = 1 << 20 // room besides the reserve, else the disk is full again at once

	lookQuery = `SELECT EXISTS (SELECT 1 FROM blobs WHERE expires_at <= ?)
		OR EXISTS (SELECT 1 FROM orphans), freelist_count, page_count
		FROM pragma_freelist_count, pragma_page_count`
	// A size that is damaged may be that of a blob in chunks.
	expiredQuery = `SELECT id, key, iif(typeof(size) = 'integer', size, 1 << 40) FROM blobs
		WHERE expires_at <= ? ORDER BY expires_at, id LIMIT ?`
	sweepQuery = `DELETE FROM chunks WHERE id IN
		(SELECT id FROM chunks WHERE id >= ?1 << 20 AND id < (?1 + 1) << 20 LIMIT ?2)`
)

// upkeep does one piece of the work and returns when to run again. It runs on the batcher's
// goroutine.
//   - On a full disk it first empties the WAL, whose room is then free. That fails if the database
//     would have to grow for it: then the next step makes the database smaller.
//   - It reclaims something. If there is nothing to reclaim, it tries to write.
//   - If the disk was too full even for that, the reserve is given up for the next piece.
//   - If not, and the disk was full, the reserve is written again.
func (sh *shard) upkeep() time.Duration {
	if sh.syncFailed {
		return sweepInterval
	}
	if sh.batcher.depth() > 0 && errors.Is(sh.currentState(), errBusy) {
		return sweepInterval // writes are waiting for a foreign lock: they try it themselves
	}
	start := time.Now()
	wasDiskFull := sh.store.reserve.isDiskFull()
	if wasDiskFull {
		sh.truncateWAL()
	}
	sh.sampleWrites()
	hasReclaimed, err := sh.reclaim()
	if err == nil && !hasReclaimed {
		err = sh.tryWrite()
	}
	sh.checkpointIfDue()
	if errors.Is(err, errBusy) {
		sh.postpone(nil, err) // writes have waited for this attempt, too
	}
	if errors.Is(err, errFull) {
		sh.store.reserve.giveUp()
	}
	if err != nil {
		return sweepInterval // recordOutcome has taken note of it
	}
	if wasDiskFull {
		sh.store.reserve.restore()
	}
	if hasReclaimed { // there may be more to do
		return time.Since(start)
	}
	return sweepInterval
}

// reclaim deletes some of what has expired or is orphaned. If there is nothing to delete, it
// returns some free pages to the file system: if the disk is full, or if they are an eighth of the
// file, more than vacuumPages, and more than the shard has written in a second, because a busy
// shard uses them again. It reports whether it has done any of that.
func (sh *shard) reclaim() (hasReclaimed bool, err error) {
	now := sh.store.now().UnixMilli()
	var hasWork bool
	var free, pages int64
	err = sh.writer.QueryRow(lookQuery, now).Scan(&hasWork, &free, &pages)
	if err != nil {
		return false, sh.recordOutcome(err)
	}
	if hasWork {
		hasSwept, err := sh.sweep(now)
		if hasSwept || err != nil {
			return hasSwept, err
		}
	}
	isMuch := free > max(vacuumPages, pages/8) && free*sh.pageBytes > sh.recentBytes
	isNeeded := free > 0 && sh.store.reserve.isDiskFull()
	if isMuch || isNeeded {
		return true, sh.returnPages()
	}
	return false, nil
}

// sampleWrites notes, once a second, how much was written in the second before.
func (sh *shard) sampleWrites() {
	if time.Since(sh.sampledAt) < sweepInterval {
		return
	}
	sh.recentBytes = sh.written - sh.sampledBytes
	sh.sampledBytes = sh.written
	sh.sampledAt = time.Now()
}

// returnPages returns some free pages to the file system.
func (sh *shard) returnPages() error {
	_, err := sh.writer.Exec(fmt.Sprintf("PRAGMA incremental_vacuum(%d)", vacuumPages))
	if err := sh.recordOutcome(err); err != nil {
		return err
	}
	return sh.truncateWAL() // the file shrinks with the checkpoint
}

// tryWrite begins a transaction, which fails if another process has the lock. If the shard is not
// ready, the transaction writes a page, which tells whether it is ready again.
func (sh *shard) tryWrite() error {
	return sh.inTransaction(func(t *tx) error {
		if sh.currentState() != nil {
			// The version stays as it is. This PRAGMA acts whenever the prepared statement runs.
			t.exec(fmt.Sprintf("PRAGMA user_version = %d", schemaVersion))
		}
		return t.err
	})
}

// sweep deletes some rows that have expired, and some chunks of an orphan that nobody uses, and the
// orphan once it has no more. It returns false if there was nothing to delete.
func (sh *shard) sweep(now int64) (bool, error) {
	expired, err := sh.findExpired(now)
	if err != nil {
		return false, sh.recordOutcome(err)
	}
	// The orphan is chosen before the transaction, which itself makes orphans: until its COMMIT,
	// readers may find their rows and hold them.
	orphan, err := sh.unusedOrphan()
	if err != nil {
		return false, sh.recordOutcome(err)
	}
	if len(expired) == 0 && orphan == 0 {
		return false, nil
	}
	for key := range expired {
		sh.cache.block(key)
		defer sh.cache.unblock(key) // when sweep returns, after the COMMIT
	}
	err = sh.inTransaction(func(t *tx) error {
		if orphan != 0 {
			swept := t.exec(sweepQuery, orphan, chunksAtOnce)
			if swept < chunksAtOnce {
				t.exec(unorphanQuery, orphan)
			}
		}
		for _, b := range expired {
			t.deleteRow(b)
		}
		return t.err
	})
	return true, err
}

// findExpired returns some of the blobs that have expired, by key, with id and size alone.
func (sh *shard) findExpired(now int64) (map[string]*blob, error) {
	rows, err := sh.writer.Query(expiredQuery, now, expireAtOnce)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	expired := map[string]*blob{}
	for rows.Next() {
		var key string
		b := &blob{}
		if err := rows.Scan(&b.id, &key, &b.size); err != nil {
			return nil, err
		}
		expired[key] = b
	}
	return expired, rows.Err()
}

// unusedOrphan returns the id of an orphan that is not in use, 0 if there is none. No upload is
// published meanwhile, because this is the batcher's goroutine. A reader takes lookups for reading,
// finds the row, and holds its content before it lets go of lookups. So while unusedOrphan has
// lookups for writing, each reader that found a content holds it, and no new reader can find an
// orphan.
func (sh *shard) unusedOrphan() (int64, error) {
	sh.lookups.Lock()
	defer sh.lookups.Unlock()
	rows, err := sh.writer.Query("SELECT id FROM orphans ORDER BY id")
	if err != nil {
		return 0, err
	}
	defer rows.Close()
	for rows.Next() {
		var id int64
		if err := rows.Scan(&id); err != nil {
			return 0, err
		}
		if !sh.isHeld(id) {
			return id, nil
		}
	}
	return 0, rows.Err()
}

// reserve is the file that makes a full disk survivable, and knows whether the disk is full. Any
// goroutine may call its methods.
type reserve struct {
	path string
	log  *slog.Logger
	full atomic.Bool // set while the disk is full

	mu    sync.Mutex // guards the file and changes of full; truncateWAL locks it for the room
	tried time.Time  // when the disk was found full, the file given up, or restore last tried
}

// isDiskFull reports whether the disk is full. Then only deletes may use it.
func (r *reserve) isDiskFull() bool { return r.full.Load() }

// begin takes over the file that the last run left, or makes one.
func (r *reserve) begin() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if sizeOf(r.path) == reserveBytes {
		return
	}
	err := r.write()
	r.full.Store(err != nil)
	if err != nil {
		r.log.Warn("disk full: only reads and deletes work; make room on the disk", "error", err)
	}
}

// setFull has all writes but deletes refused. cause is what one of them met.
func (r *reserve) setFull(cause error) {
	if r.isDiskFull() { // nearly always, and without the lock, which a checkpoint may hold
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.isDiskFull() {
		r.log.Error("disk full: only reads and deletes work; make room on the disk", "error", cause)
	}
	r.full.Store(true)
	r.tried = time.Now()
}

// giveUp removes the file, so that a delete or a checkpoint has its room.
func (r *reserve) giveUp() {
	r.mu.Lock()
	defer r.mu.Unlock()
	os.Remove(r.path) // it may be missing already
	r.tried = time.Now()
}

// restore tries to write the file again if it was given up. If there is some room besides it, the
// disk is not full any more. restore tries once a second at most: while it tries, other programs
// find the disk full.
func (r *reserve) restore() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.isDiskFull() || time.Since(r.tried) < sweepInterval {
		return
	}
	r.tried = time.Now()
	if err := r.write(); err != nil {
		return
	}
	r.full.Store(false)
	r.log.Info("the disk has room again: writes work")
}

// write makes the file if it is not there, or returns an errFull. If there is no room for
// spareBytes besides the file, write keeps it, and returns an errFull, too. r.mu is held, except
// when the store closes.
func (r *reserve) write() error {
	err := r.growTo(reserveBytes)
	if err != nil {
		os.Remove(r.path)
	} else {
		err = r.growTo(reserveBytes + spareBytes)
		os.Truncate(r.path, reserveBytes) // else the next start does it
	}
	if err != nil {
		return fmt.Errorf("%w: no room for the reserve: %w", errFull, err)
	}
	return nil
}

// growTo appends to the file until it has size bytes.
func (r *reserve) growTo(size int64) error {
	f, err := os.OpenFile(r.path, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	noise := make([]byte, max(0, size-sizeOf(r.path)))
	rand.Read(noise) // random, so that no file system stores it as a hole
	_, err = f.Write(noise)
	return errors.Join(err, f.Close())
}

// ==== Sources ====================================================================================
// How check, backup and migrate read a data directory. They read it as any other SQLite client
// would, in a process of their own: a server of ours may be using it. They read it row by row,
// because a transaction over the whole work would keep the WAL from being used again. Only SQLite's
// check of its pages and the copy of a shard are long transactions.

// dataDir is a data directory that a command reads, and what the command has found in it.
type dataDir struct {
	*call
	path    string
	indexes []int   // numbers of the shards, from the names of their files
	isRust  bool    // the Rust server wrote it
	first   *record // of the first shard that could be opened; of the Rust server's, made up

	defects int         // all of them
	damaged []storedRow // blobs whose content or row is damaged
	blobs   int64
	bytes   int64 // of the blobs, as the client sees them
}

func (cli *call) listDir(dir string) (*dataDir, error) {
	indexes, err := shardFiles(dir)
	if err != nil {
		return nil, err
	}
	return &dataDir{call: cli, path: dir, indexes: indexes}, nil
}

// each calls visit with one shard after the other. The first error ends it.
func (d *dataDir) each(task string, visit func(*source) error) error {
	for _, i := range d.indexes {
		if err := d.withShard(task, i, visit); err != nil {
			return fmt.Errorf("shard %d of %s: %w", i, d.path, err)
		}
	}
	return nil
}

// withShard opens shard i, calls visit with it, and closes it. task is shown as progress.
func (d *dataDir) withShard(task string, i int, visit func(*source) error) error {
	position := slices.Index(d.indexes, i) + 1
	d.progress.startTask(task, shardName(i), position, len(d.indexes))
	s, err := openSource(d.path, i)
	if err != nil {
		return err
	}
	defer s.close()
	isRust := s.record == nil
	if isRust != d.isRust {
		return fmt.Errorf("%w: its header is not that of a shard", errCorrupt)
	}
	if d.first == nil {
		d.first = s.record
	}
	if !d.isRust {
		if err := s.record.fits(d.first, i); err != nil {
			return err
		}
	}
	err = visit(s)
	return translate(err)
}

// missing returns the numbers of the shards whose file is not there. If no shard could be opened,
// nobody knows how many there must be.
func (d *dataDir) missing() []int {
	if d.first == nil {
		return nil
	}
	return missingShards(d.indexes, d.first.NumShards)
}

// home returns the number of the shard that key belongs to.
func (d *dataDir) home(key string) int {
	return int(hashes[d.first.Hash](key) % uint64(d.first.NumShards))
}

// defect counts a defect and reports it.
func (d *dataDir) defect(shard int, format string, args ...any) {
	d.defects++
	d.report(shard, format, args...)
}

// report prints one line about a shard on stdout.
func (d *dataDir) report(shard int, format string, args ...any) {
	text := strings.ReplaceAll(fmt.Sprintf(format, args...), "\n", " ")
	fmt.Fprintf(d.stdout, "shard %d: %s\n", shard, text)
}

func (d *dataDir) blobsAndBytes() string {
	return fmt.Sprintf("%d blobs, %s", d.blobs, humanSize(d.bytes))
}

// summarize prints the last line of a command on stdout.
func (d *dataDir) summarize(format string, args ...any) {
	result := fmt.Sprintf(format, args...)
	fmt.Fprintf(d.stdout, "%s: %d shards, %s, %s\n",
		d.path, len(d.indexes), d.blobsAndBytes(), result)
}

// source is a shard that is only read, ours or the Rust server's.
type source struct {
	index     int
	db        *sql.DB
	record    *record   // nil: the Rust server wrote the shard
	structure *sql.Stmt // what is wrong with the shard as a whole: a text a row
	nextRow   *sql.Stmt // the first row of a range of ids, as scanBlob wants it
	dataStmt  *sql.Stmt // a chunk's data by its id; nil for the Rust server's
}

// storedRow is a blob in a source, as its row says.
type storedRow struct {
	*blob
	source *source
	key    string
	err    error // errNoBlob, an errDamaged about the row itself, or why it could not be read
}

// openSource opens shard i of dir. Nothing in it is changed. The caller closes the source.
func openSource(dir string, i int) (*source, error) {
	file := filepath.Join(dir, shardName(i))
	if sizeOf(file) <= 0 { // to open it would delete a WAL that may hold everything
		return nil, fmt.Errorf("%w: the file is missing or empty", errCorrupt)
	}
	s := &source{index: i, db: openReadOnly(file)}
	if err := s.prepare(); err != nil {
		s.close()
		return nil, schemaError(translate(err))
	}
	return s, nil
}

// close closes the database. Nothing was written, so there is no error to tell.
func (s *source) close() { s.db.Close() }

const (
	integrityQuery = `SELECT 'SQLite: ' || integrity_check FROM pragma_integrity_check
		WHERE integrity_check <> 'ok'`

	// What SQLite does not know: each chunk belongs to a blob or to an orphan, and a partial index
	// has exactly the rows of its condition. A chunk has 262144 bytes, and the low 20 bits of its
	// id count the chunks of a content. At most a hundred defects are listed.
	structureQuery = integrityQuery + `
		UNION ALL -- chunks that no blob has
		SELECT 'chunk ' || (id & 1048575) || ' of content ' || (id >> 20) || ' belongs to no blob'
		FROM chunks WHERE NOT EXISTS (SELECT 1 FROM orphans WHERE orphans.id = chunks.id >> 20)
		AND NOT EXISTS (SELECT 1 FROM blobs WHERE blobs.id = chunks.id >> 20
			AND size > 262144 AND (chunks.id & 1048575) <= (size - 1) / 262144)
		UNION ALL -- too many or too few rows in the index
		SELECT 'index expiring has ' || indexed || ' rows instead of ' || there FROM
			(SELECT count(*) AS indexed FROM blobs INDEXED BY expiring
				WHERE expires_at IS NOT NULL),
			(SELECT count(*) AS there FROM blobs NOT INDEXED
				WHERE expires_at IS NOT NULL)
		WHERE indexed <> there
		LIMIT 100`

	nextRowQuery = `SELECT ` + blobColumns + `, data FROM blobs
		WHERE id > ? AND id <= ? ORDER BY id LIMIT 1`

	// The Rust server's table has only keys and contents. The other columns of blobColumns are made
	// up, in their order: size, stored, codec, crc32, sha256, content_type, created_at, updated_at,
	// expires_at, version.
	rustRowQuery = `SELECT rowid, coalesce(CAST(key AS BLOB), ''), 0, 0, 0, 0, zeroblob(32),
		'` + octetStream + `', unixepoch() * 1000, unixepoch() * 1000, 0, 0, data FROM blobs
		WHERE rowid > ? AND rowid <= ? ORDER BY rowid LIMIT 1`
)

// prepare reads the record and prepares the statements.
func (s *source) prepare() error {
	var application int64
	err := s.db.QueryRow("PRAGMA application_id").Scan(&application)
	if err != nil {
		return err
	}
	structure := integrityQuery
	nextRow := rustRowQuery
	if application == applicationID {
		structure = structureQuery
		nextRow = nextRowQuery
		s.record, err = recordOf(s.db)
		if err != nil {
			return err
		}
		s.dataStmt, err = s.db.Prepare(dataQuery)
		if err != nil {
			return err
		}
	}
	s.structure, err = s.db.Prepare(structure)
	if err != nil {
		return err
	}
	s.nextRow, err = s.db.Prepare(nextRow)
	return err
}

// eachRow calls visit with the rows that were there when it began, each found by a query of its
// own. In a table whose pages are not in order it can miss rows: checkStructure finds such a table.
func (s *source) eachRow(ctx context.Context, visit func(storedRow) error) error {
	var last int64
	err := s.db.QueryRow("SELECT coalesce(max(rowid), 0) FROM blobs").Scan(&last)
	if err != nil {
		return err
	}
	above := int64(math.MinInt64)
	for ctx.Err() == nil {
		row := s.firstRow(above, last)
		if errors.Is(row.err, errNoBlob) {
			return nil
		}
		if row.err != nil && !errors.Is(row.err, errDamaged) {
			return row.err
		}
		if row.id <= above { // in a damaged table the loop could go on for ever
			return fmt.Errorf("%w: row %d follows row %d", errCorrupt, row.id, above)
		}
		above = row.id
		if err := visit(row); err != nil {
			return err
		}
	}
	return ctx.Err()
}

// firstRow returns the first row with an id greater than above, at most last.
func (s *source) firstRow(above, last int64) storedRow {
	b, key, err := scanBlob(s.nextRow.QueryRow(above, last))
	return storedRow{b, s, key, err}
}

// row returns the row with this id.
func (s *source) row(id int64) storedRow { return s.firstRow(id-1, id) }

// content returns a reader of the blob's content. The Rust server has contents of any size in the
// row, at most 30 MB, because it took no more.
func (row storedRow) content() io.Reader {
	if row.source.record == nil {
		return bytes.NewReader(row.data)
	}
	return row.reader()
}

// reader returns a reader of a content of ours.
func (row storedRow) reader() *blobReader {
	return &blobReader{dataStmt: row.source.dataStmt, blob: row.blob}
}

// verify reads a content of ours and compares it with its row.
func (row storedRow) verify() error {
	if row.err != nil {
		return row.err
	}
	content := row.reader()
	sha := sha256.New()
	checksum := crc32.NewIEEE()
	_, err := io.Copy(io.MultiWriter(sha, checksum), content)
	if err != nil {
		return err
	}
	sum := sha.Sum(nil)
	if !bytes.Equal(sum, row.sum[:]) || content.stored != row.stored {
		return fmt.Errorf("%w: SHA-256 %x, %d stored bytes, but the row says %x, %d",
			errDamaged, sum, content.stored, row.sum, row.stored)
	}
	// The CRC-32, too: a gzip answer ends with it, and the reader compares it only for deflated and
	// chunked contents.
	return row.compare(checksum.Sum32())
}

// ==== Check ======================================================================================
// check verifies a data directory, in use or not: the structure of each shard, whether it belongs
// to the others, and the checksum, the key and the place of each blob. Each defect is a line.

func cmdCheck(ctx context.Context, cli *call) error {
	if len(cli.args) == 0 {
		cfg, _, err := cli.config()
		if err != nil {
			return err
		}
		cli.args = []string{cfg.DataDir}
	}
	dir := cli.args[0]
	if err := refuseDir(dir); err != nil {
		return err
	}
	d, err := cli.listDir(dir)
	if err != nil {
		return err
	}
	if err := d.check(ctx); err != nil {
		return err
	}
	d.summarize("%d defects", d.defects)
	if d.defects > 0 {
		return fmt.Errorf("%s has defects: restore what is damaged from a backup", dir)
	}
	return nil
}

// check counts and reports what is wrong. An error means that d could not be checked, and says
// nothing of its state.
func (d *dataDir) check(ctx context.Context) error {
	for _, i := range d.indexes {
		err := d.withShard("checking", i, func(s *source) error {
			if err := d.checkStructure(ctx, s); err != nil {
				return err
			}
			return s.eachRow(ctx, d.checkBlob)
		})
		if err != nil && !isDefect(err) {
			return fmt.Errorf("cannot check shard %d: %w", i, err)
		}
		if err != nil {
			d.defect(i, "%v", err)
		}
	}
	for _, i := range d.missing() {
		d.defect(i, "the file is missing")
	}
	return nil
}

// isDefect reports whether err says that something is wrong with a directory. Any other error only
// means that something could not be read.
func isDefect(err error) bool {
	return errors.Is(err, errCorrupt) || errors.Is(err, errDamaged) || errors.Is(err, errMisplaced)
}

// checkStructure reports what is wrong with a shard as a whole. An error may come after defects.
func (d *dataDir) checkStructure(ctx context.Context, s *source) error {
	rows, err := s.structure.QueryContext(ctx)
	if err != nil {
		return err
	}
	defer rows.Close()
	for rows.Next() {
		var text string
		if err := rows.Scan(&text); err != nil {
			return schemaError(err)
		}
		d.defect(s.index, "%s", text)
	}
	return rows.Err()
}

// checkBlob checks one blob. An error means that the check cannot go on.
func (d *dataDir) checkBlob(row storedRow) error {
	problem := row.verify()
	if problem != nil && !isDefect(problem) {
		return problem
	}
	if errors.Is(problem, errDamaged) {
		// A server may have replaced or deleted the blob meanwhile. If it is in chunks, which were
		// read one by one, its row is gone then. A small one was read at once.
		isGone := errors.Is(row.source.row(row.id).err, errNoBlob)
		if isGone {
			return nil
		}
		row.data = nil // only its place is needed
		d.damaged = append(d.damaged, row)
	}
	d.blobs++
	d.bytes += row.size
	d.progress.setDone(d.blobsAndBytes())
	if problem == nil {
		problem = checkKey(row.key)
	}
	if problem == nil && d.home(row.key) != row.source.index {
		problem = fmt.Errorf("it belongs to shard %d", d.home(row.key))
	}
	if problem != nil {
		d.defect(row.source.index, "key %q: %v", row.key, problem)
	}
	return nil
}

// ==== Backup =====================================================================================
// backup copies the data directory, each shard as it was at the moment when its turn came. How a
// copy is begun, checked and completed is the same for migrate. A marker, partialFile, says that a
// copy is incomplete, from before its first byte until all of it is verified and synced.

func cmdBackup(ctx context.Context, cli *call) error {
	cfg, _, err := cli.config()
	if err != nil {
		return err
	}
	if err := refuseDir(cfg.DataDir); err != nil {
		return err
	}
	from, err := cli.listDir(cfg.DataDir)
	if err != nil {
		return err
	}
	to := cli.args[0]
	lock, err := from.beginCopy(ctx, to)
	if err != nil {
		return err
	}
	defer lock.Close()
	err = from.each("copying", func(s *source) error {
		file := filepath.Join(to, shardName(s.index))
		if err := createFile(file); err != nil {
			return err
		}
		_, err := s.db.ExecContext(ctx, "VACUUM INTO ?", file)
		return err
	})
	if err != nil {
		return err
	}
	copied, err := cli.checkCopy(ctx, to)
	if err != nil {
		return err
	}
	if err := copied.compareDamage(from); err != nil {
		return err
	}
	if err := copied.completeCopy(); err != nil {
		return err
	}
	if len(copied.damaged) == 0 {
		copied.summarize("copied and verified")
		return nil
	}
	copied.summarize("copied, %d damaged, as in the original", len(copied.damaged))
	return fmt.Errorf("the copy is complete, but has the damaged blobs of %s; "+
		"restore or delete them", from.path)
}

// compareDamage returns an error unless all defects of the copy are contents that are damaged in
// the directory from as well. Then the copy is as good as the original.
func (copied *dataDir) compareDamage(from *dataDir) error {
	if copied.defects > len(copied.damaged) {
		return fmt.Errorf("the copy has %d defects, see above; check the original", copied.defects)
	}
	for _, row := range copied.damaged {
		err := from.withShard("comparing", row.source.index, func(s *source) error {
			return s.row(row.id).verify() // VACUUM keeps the ids of rows
		})
		if err == nil || errors.Is(err, errNoBlob) {
			return fmt.Errorf("key %q is whole in the original, or has changed; run backup again",
				row.key)
		}
		if !errors.Is(err, errDamaged) {
			return err
		}
	}
	return nil
}

// beginCopy surveys the directory to copy. Then it locks the directory target, marks it as an
// incomplete copy, and removes the shards of an earlier one. The caller closes the lock.
func (from *dataDir) beginCopy(ctx context.Context, target string) (*sql.DB, error) {
	// Before the survey, which may take long.
	if _, err := targetFiles(target); err != nil {
		return nil, err
	}
	if err := from.survey(ctx); err != nil {
		return nil, err
	}
	lock, err := lockDir(target)
	if err != nil {
		return nil, err
	}
	if err := startOver(target); err != nil {
		return nil, errors.Join(err, lock.Close())
	}
	from.progress.leaves = target + " holds an incomplete copy"
	return lock, nil
}

// survey returns an error unless all shards are there, belong together and have a sound structure.
// Contents are not read yet. SQLite reads a damaged table without an error and leaves rows out, so
// nothing is copied from one.
func (from *dataDir) survey(ctx context.Context) error {
	err := from.each("checking", func(s *source) error {
		return from.checkStructure(ctx, s)
	})
	if err != nil {
		return err
	}
	missing := from.missing()
	if len(missing) > 0 {
		return fmt.Errorf("shard %d of %s is missing; restore it from a backup",
			missing[0], from.path)
	}
	if from.defects > 0 {
		return fmt.Errorf("%s is damaged, see above; restore it from a backup", from.path)
	}
	return nil
}

// targetFiles returns what is in dir, or an error if a copy may not go there. It may if dir is
// missing, or empty except for a lock file, or has the marker of an incomplete copy.
func targetFiles(dir string) ([]fs.DirEntry, error) {
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("cannot copy into %s: %w", dir, err)
	}
	if fileExists(filepath.Join(dir, partialFile)) {
		return entries, nil
	}
	for _, entry := range entries {
		if entry.Name() != lockFile {
			return nil, fmt.Errorf("cannot copy into %s: it is not empty, %s is in the way; "+
				"a copy needs a new directory", dir, entry.Name())
		}
	}
	return entries, nil
}

// startOver writes the marker and removes the shards of an incomplete copy. dir is locked.
func startOver(dir string) error {
	// Look again: before dir was locked another command may have completed a copy in it.
	entries, err := targetFiles(dir)
	if err != nil {
		return err
	}
	// The marker first, else what is left of a killed run could pass for a whole copy.
	if err := createFile(filepath.Join(dir, partialFile)); err != nil {
		return err
	}
	if err := syncPaths(dir); err != nil {
		return err
	}
	for _, entry := range entries {
		name := entry.Name()
		if !strings.HasPrefix(name, "shard_") && name != creatingFile && name != reserveFile {
			continue
		}
		if err := os.Remove(filepath.Join(dir, name)); err != nil {
			return err
		}
	}
	return nil
}

// checkCopy checks the copy in dir. Whether it is good is for the caller to decide.
func (cli *call) checkCopy(ctx context.Context, dir string) (*dataDir, error) {
	copied, err := cli.listDir(dir)
	if err != nil {
		return nil, err
	}
	return copied, copied.check(ctx)
}

// completeCopy syncs a copy that was checked, and removes the marker.
func (copied *dataDir) completeCopy() error {
	files := []string{copied.path, parentOf(copied.path)}
	for _, i := range copied.indexes {
		file := filepath.Join(copied.path, shardName(i))
		// A copy is restored by copying its files over a data directory. The WAL that a crashed
		// server left there is then overwritten by this empty one, and not replayed.
		if err := createFile(file + "-wal"); err != nil {
			return err
		}
		files = append(files, file, file+"-wal")
	}
	if err := syncPaths(files...); err != nil {
		return err
	}
	// The marker last, else a power loss leaves half a copy that passes for a whole one.
	if err := os.Remove(filepath.Join(copied.path, partialFile)); err != nil {
		return err
	}
	copied.progress.leaves = ""
	return syncPaths(copied.path)
}

// ==== Migrate ====================================================================================
// migrate copies the blobs of a directory, ours or the Rust server's, into the configured one,
// which is new. First it copies the rows that are in the shard of their hash, and then the others,
// unless their key is there already: of a key that is found twice the right copy is taken.

type migration struct {
	from   *dataDir
	target *store

	copied, duplicates int64
	lacking            int64 // blobs that are not copied: a bad key, or a damaged content
}

func cmdMigrate(ctx context.Context, cli *call) error {
	cfg, _, err := cli.config()
	if err != nil {
		return err
	}
	dir := cli.args[0]
	if err := refusePartial(dir); err != nil {
		return err
	}
	from, err := cli.listDir(dir)
	if err != nil {
		return err
	}
	if fileExists(filepath.Join(dir, lockFile)) { // else no server of ours was ever there
		lock, err := lockDir(dir)
		if err != nil {
			return err
		}
		defer lock.Close()
	}
	first, err := openSource(dir, from.indexes[0])
	if err == nil { // else survey says what is wrong
		from.isRust = first.record == nil
		first.close()
	}
	if from.isRust {
		from.first = &record{NumShards: int64(len(from.indexes)), Hash: "fnv1a"}
	}
	lock, err := from.beginCopy(ctx, cfg.DataDir)
	if err != nil {
		return err
	}
	defer lock.Close()
	m := &migration{from: from}
	if err := m.fill(ctx, cfg, lock); err != nil {
		return err
	}
	result, err := cli.checkCopy(ctx, cfg.DataDir)
	if err != nil {
		return err
	}
	if result.defects > 0 || result.blobs != m.copied {
		return fmt.Errorf("%d blobs were copied, %d are there, with %d defects: see the lines above",
			m.copied, result.blobs, result.defects)
	}
	if err := result.completeCopy(); err != nil {
		return err
	}
	result.summarize("copied and verified; found twice: %d", m.duplicates)
	return nil
}

// fill creates the store that cfg describes, and copies every blob into it. lock is the lock of its
// directory.
func (m *migration) fill(ctx context.Context, cfg *config, lock *sql.DB) error {
	targetConfig := *cfg
	targetConfig.AsyncWrite = true // the next row is read while this one waits for its batch
	targetConfig.BatchSize = 64
	targetConfig.BatchTimeoutMS = 0    // a window would delay each row that copyBlob waits for
	targetConfig.Durability = "normal" // completeCopy syncs the result
	// The clock stands at 1970, so that expired blobs are copied as well. The server deletes them.
	// The times in the copy come from copyOf.
	in1970 := func() time.Time { return time.Unix(0, 0) }
	st, err := openLocked(ctx, &targetConfig, lock, newLogger(cfg, m.from.stderr), in1970)
	if err != nil {
		return err
	}
	m.target = st
	err = m.copyRows(ctx, true)
	if err == nil {
		err = m.copyRows(ctx, false)
	}
	st.stop() // else queued writes would wait for another process's lock without end
	err = errors.Join(err, st.closeShards())
	if err != nil {
		return err
	}
	didSyncFail := func(sh *shard) bool { return sh.syncFailed }
	if slices.ContainsFunc(st.shards, didSyncFail) { // the next sync would not tell any more
		return errors.New("a sync of the disk failed; run migrate again")
	}
	if m.lacking > 0 {
		return fmt.Errorf("the copy lacks %d blobs, listed above; "+
			"rename the key, restore the blob, or delete it", m.lacking)
	}
	return nil
}

// copyRows copies either the rows that are in the shard of their hash, or the others.
func (m *migration) copyRows(ctx context.Context, placed bool) error {
	return m.from.each("copying", func(s *source) error {
		return s.eachRow(ctx, func(row storedRow) error {
			isPlaced := m.from.home(row.key) == s.index
			if isPlaced != placed {
				return nil
			}
			return m.copyRow(row)
		})
	})
}

// copyRow copies one blob, or reports why it is not copied. An error ends the migration.
func (m *migration) copyRow(row storedRow) error {
	err := m.copyBlob(row)
	switch {
	case err == nil:
		m.copied++
		m.from.progress.setDone(fmt.Sprintf("%d blobs", m.copied))
	case errors.Is(err, errCondition):
		m.duplicates++
		m.from.report(row.source.index, "key %q: not taken, there is another copy of it", row.key)
	case errors.Is(err, errBadRequest), errors.Is(err, errDamaged):
		m.lacking++
		m.from.report(row.source.index, "key %q: %v", row.key, err)
	default:
		return fmt.Errorf("key %q: %w", row.key, err)
	}
	return nil
}

// copyBlob copies one blob. A misplaced one is copied only if its key is not there already. An
// errBadRequest is about the key, an errDamaged about the source.
func (m *migration) copyBlob(row storedRow) error {
	if row.err != nil {
		return row.err
	}
	sh, err := m.target.shardOf(row.key)
	if err != nil {
		return err
	}
	options := &putOptions{contentType: row.contentType, copyOf: row.blob}
	if m.from.home(row.key) != row.source.index {
		options.conditions.noneMatch = "*"
	}
	options.verify = func(sum []byte) error {
		if !m.from.isRust && !bytes.Equal(sum, row.sum[:]) {
			return fmt.Errorf("%w: its SHA-256 is %x, not %x", errDamaged, sum, row.sum)
		}
		return nil
	}
	_, _, err = sh.put(row.key, row.content(), options)
	return err
}

// ==== Transport ==================================================================================
// What lies between net/http and a connection: deadlines, the gathering of small answers, the
// certificate. Deadlines have one rule. A client has a fixed time for each step, and a step is up
// to pieceBytes of a body sent or taken. The time that the server itself needs between two steps,
// to commit for example, is not the client's.

const (
	pieceBytes     = 32 << 10
	discardTimeout = 10 * time.Second // for the rest of a body after an error was answered

	// takeTimeout is for a step of a download. With --limit-rate, curl 7 takes at once what it may
	// have in 100 s, and then nothing for 100 s.
	takeTimeout = 2 * stallTimeout

	// unsentBytes limits how much of an answer the kernel holds that is not yet on its way to the
	// client. Without it the kernel holds up to 4 MiB, and takes more only when a third of that is
	// sent: a client that takes 20 kB/s would make a step in a minute.
	unsentBytes  = 128 << 10
	notSentLowat = 25 // TCP_NOTSENT_LOWAT of Linux
)

// listen listens on addr. The connections inherit the limit unsentBytes from the listener, except
// from one for Multipath TCP.
func listen(addr string) (net.Listener, error) {
	listenConfig := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		return c.Control(func(fd uintptr) {
			if runtime.GOOS == "linux" {
				// After an error the steps of a slow client are only larger: a megabyte.
				syscall.SetsockoptInt(int(fd), syscall.IPPROTO_TCP, notSentLowat, unsentBytes)
			}
		})
	}}
	listenConfig.SetMultipathTCP(false)
	return listenConfig.Listen(context.Background(), "tcp", addr)
}

// renewDeadlines gives the client the full time for its next step. It is called before each step.
// It moves the deadlines at most once a second, because to move them costs a microsecond. Errors
// are left to the read or write that follows.
func (w *response) renewDeadlines() {
	now := time.Now()
	if now.Sub(w.renewed) < time.Second {
		return
	}
	w.renewed = now
	controller := http.NewResponseController(w.ResponseWriter)
	controller.SetReadDeadline(now.Add(stallTimeout))
	controller.SetWriteDeadline(now.Add(takeTimeout))
}

// discardBody reads what the client still sends after an error was answered. Many clients read no
// answer before they have sent the whole body. To close the connection now would reset it, and the
// answer would be lost. The connection is cut off if the body does not end within discardTimeout.
func (w *response) discardBody(r *http.Request) {
	if r.ContentLength == 0 || r.ProtoMajor != 1 {
		return
	}
	controller := http.NewResponseController(w.ResponseWriter)
	controller.Flush()
	controller.SetReadDeadline(time.Now().Add(discardTimeout))
	if _, err := io.Copy(io.Discard, r.Body); err != nil {
		panic(http.ErrAbortHandler)
	}
}

// serverLog takes the lines that net/http logs. A failed handshake is no warning: often it is a
// probe that connects and leaves.
type serverLog struct{ log *slog.Logger }

func (l serverLog) Write(line []byte) (int, error) {
	level := slog.LevelWarn
	if bytes.HasPrefix(line, []byte("http: TLS handshake error")) {
		level = slog.LevelDebug
	}
	l.log.Log(context.Background(), level, string(bytes.TrimSpace(line)))
	return len(line), nil
}

// certificate reads the key pair at each handshake: 30 to 130 µs of its 1 to 2 ms. If the files
// cannot be read, or do not match because only one of them is new, it returns the last pair. It
// returns an error if there is none yet.
func (s *server) certificate(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	pair, err := tls.LoadX509KeyPair(s.cfg.TLSCert, s.cfg.TLSKey)
	s.pairMu.Lock()
	defer s.pairMu.Unlock()
	if err == nil {
		s.pair = &pair
		s.pairError = ""
		return s.pair, nil
	}
	if err.Error() != s.pairError {
		s.pairError = err.Error()
		s.log.Warn("the certificate cannot be read; the last one stays in use, if there was one",
			"error", err)
	}
	if s.pair == nil {
		return nil, err
	}
	return s.pair, nil
}

// corkedConn gathers what is written between cork and uncork, and sends it with one system call.
// net/http sends the header of an answer and a body larger than its 4 KiB buffer with two calls.
// Each of them wakes the client, which takes a quarter of the time of a small GET. Only the
// goroutine that serves the connection's request may cork, and it uncorks before it returns.
type corkedConn struct {
	net.Conn
	corked *bytes.Buffer // nil: not corked
}

var corkBuffers = sync.Pool{New: func() any { return new(bytes.Buffer) }}

func (c *corkedConn) cork() {
	c.corked = corkBuffers.Get().(*bytes.Buffer)
}

func (c *corkedConn) uncork() {
	if _, err := c.corked.WriteTo(c.Conn); err != nil {
		c.Close() // else the next answer would follow a part of this one
	}
	c.corked.Reset()
	corkBuffers.Put(c.corked)
	c.corked = nil
}

func (c *corkedConn) Write(p []byte) (int, error) {
	if c.corked != nil {
		return c.corked.Write(p)
	}
	return c.Conn.Write(p)
}

// CloseWrite lets net/http end its answer while the client still sends. Without it the client of a
// request that net/http itself refuses sees a reset connection instead of the answer.
func (c *corkedConn) CloseWrite() error {
	tcp, isTCP := c.Conn.(*net.TCPConn)
	if !isTCP {
		return errors.ErrUnsupported
	}
	return tcp.CloseWrite()
}

// connKey is the context key of a request's connection.
type connKey struct{}

// corkedListener accepts connections that can be corked.
type corkedListener struct{ net.Listener }

func (l corkedListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return &corkedConn{Conn: conn}, nil
}
