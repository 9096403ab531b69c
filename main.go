/*
Blobnom is a small, durable blob server: an HTTP interface over a set of
SQLite databases (shards), the shard of a key chosen by a hash of the key.

Usage:

	blobnom [-config FILE] [COMMAND] [ARGUMENTS]

	serve      run the server (the default)
	check      verify a data directory
	backup     copy it, also while the server runs
	migrate    copy the blobs of another directory into a new one: other shard
	           count, other hash, other codec, or of the Rust servers
	sign       print a signed URL path that expires
	version    print the version

A session, with the server started by "go run ." in another terminal:

	$ curl -T cat.jpg -H 'Content-Type: image/jpeg' localhost:3000/blob/photos/cat.jpg
	$ curl -o copy.jpg localhost:3000/blob/photos/cat.jpg
	$ curl -r 0-99 localhost:3000/blob/photos/cat.jpg | wc -c
	100
	$ curl 'localhost:3000/blob/?prefix=photos/&limit=100'
	$ curl -T note.txt -H 'If-None-Match: *' 'localhost:3000/blob/note.txt?ttl=1h'
	$ curl -X DELETE localhost:3000/blob/photos/cat.jpg

A key is the rest of the path after /blob/, percent-decoded: 1 to 1,024 bytes
of UTF-8 without NUL; slashes belong to it. POST and PUT store a blob and
answer 201, GET and HEAD read it, whole or in ranges, DELETE removes it and
answers 204. An answer of 201 or 204 means that the write is committed and,
with durability = "full", synced to disk. With async_write the answer is 202:
the write is queued, and whatever reads the key next waits for it.

A write may ask for more: If-Match and If-None-Match, decided where the write is
committed, so that of many creators of a key one wins (the others get 412 and
change nothing); Repr-Digest or Content-Digest with the body's SHA-256, and a
body that differs is refused; ?ttl= with a duration or whole seconds, after which
the blob is gone and its space reclaimed. GET /blob/ lists keys in order, with
prefix, after and limit; the answer's "next" is the "after" of the next page.

With storage_compression a blob that gets smaller by it lies deflated, with
output_compression clients that accept gzip get it as it lies. Neither changes
what a client reads: ranges, the digest and the plain ETag are of the content as
it came.

Configuration is one TOML file (see config.toml.example), every key of which
can also be given as BLOBNOM_<KEY> in the environment.

The file is written to be read from top to bottom; it follows one PUT from the
socket to the disk:

	Vocabulary      limits, errors, the schema of a shard
	Commands        main, the command line
	Configuration   file, environment, defaults
	HTTP server     routes, the error-to-status switch, deadlines, shutdown
	Handlers        one function per request
	Fields          what its headers and its query ask for
	Store           the data directory: which shard has a key; listings
	Shard           one database: reads, and one PUT as seen by its request
	Batcher         one goroutine per shard groups writes into transactions
	Writer          the SQL of those writes
	Codec           content deflated, and sent as it lies
	Cache, content  what readers hold on to
	Metrics         what Prometheus is told
	Upkeep          expiry, reclaiming space, surviving a full disk
	Maintenance     check, backup, migrate
*/
package main

import (
	"bufio"
	"bytes"
	"cmp"
	"compress/flate"
	"compress/gzip"
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
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
	"hash/crc32"
	"hash/fnv"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"math"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/signal"
	"path"
	"path/filepath"
	"reflect"
	"regexp"
	"runtime"
	"runtime/debug"
	"slices"
	"sort"
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

// ============================================================================
// Vocabulary
//
// The words the other chapters share: limits with the reason for their value,
// the errors that mean something to a client, and the shape of a shard.
// ============================================================================

const version = "1.0.0"

const (
	maxKeyBytes         = 1024 // of a key, decoded
	maxContentTypeBytes = 255  // of a stored Content-Type

	// chunkSize is where a blob stops living in its row and is streamed
	// through the chunks table. An upload holds two chunks in memory, a
	// download one and the driver's copy of it.
	chunkSize = 256 << 10

	// A content id leaves 20 bits for the chunk's sequence number, which
	// bounds a blob even where max_blob_bytes does not.
	seqBits     = 20
	hardMaxBlob = chunkSize << seqBits // 256 GiB

	// smallBody is what a request reserves before its client has sent
	// anything; a whole chunk is taken only once that much has arrived.
	smallBody = 16 << 10

	// batchBytes is where a batch is closed: a batch of large chunks does not
	// make the small writes beside it wait, nor the WAL outgrow the reserve.
	batchBytes = 1 << 20

	// cacheBytes bounds the committed contents kept for readers, over all
	// shards: 20,000 of 4 KiB. A hit takes 25 µs where SQLite makes it 60.
	// cacheItem is the largest one that gets in.
	cacheBytes = 96 << 20
	cacheItem  = 64 << 10

	// What is deflated at rest: at least minDeflate bytes that come out an
	// eighth smaller. Level 1, as 5 takes three times as long for a sixth less.
	// sampleBytes are looked at to see whether trying is worth it.
	minDeflate   = 256
	deflateLevel = flate.BestSpeed
	sampleBytes  = 4 << 10

	minEncode = 1 << 10            // raw blobs below are not compressed on their way out
	maxTTL    = 876000 * time.Hour // a hundred years, nearly
	maxUnix   = 253402300799       // seconds: the end of the year 9999, beyond which RFC 3339 has no words

	defaultPage, maxPage = 1000, 10_000 // blobs in a listing
	pagePiece            = 250          // of which so many are in memory

	readersPerShard = 8                    // connections; each reads for microseconds
	readerCacheKiB  = 512                  // page cache of each; holds the upper index pages
	opOverhead      = 2 << 10              // what a queued write counts for beside key and content, in memory and in the WAL
	reserveBytes    = 6 << 20              // head-room on a full disk: more than a shard's WAL, see Upkeep
	sliceTime       = 2 * time.Millisecond // of upkeep between two batches: about what a batch takes
	copyPages       = 256                  // copied by backup between two pauses
	migratePending  = 8 << 20              // bytes that migrate has on their way to the disk
	paceFactor      = 8                    // that last so many times as long
	sweepChunks     = 4                    // chunks deleted between two looks at the time
	vacuumPages     = 256                  // free pages returned per slice, and left alone
	headerTimeout   = 15 * time.Second
	stallTimeout    = 60 * time.Second // without progress, up or down
	idleTimeout     = 120 * time.Second
	queueTimeout    = 10 * time.Second       // waiting for room in the queue
	drainTimeout    = 15 * time.Second       // finishing requests after SIGTERM
	busyTimeout     = 5 * time.Second        // another process holds a SQLite lock
	lockTimeout     = 300 * time.Millisecond // who but asks for a directory's lock has it for an instant
	sweepInterval   = time.Second
	reserveInterval = 100 * time.Millisecond // between attempts to have the reserve back
	progressGrain   = 60                     // deadlines are moved at most this often per stallTimeout
	writePiece      = 32 << 10               // after which they may be moved
)

// kind is an error that means something to a client: the one place where an
// error becomes a status code. An error may wrap a kind together with its
// cause: of a status of 500 and above the client sees the kind alone, the log
// all of it.
type kind struct {
	status int
	text   string
}

func (k *kind) Error() string { return k.text }

var (
	errBadRequest = &kind{http.StatusBadRequest, "bad request"}
	errToken      = &kind{http.StatusUnauthorized, "unauthorized"} // and no hint why
	errNotFound   = &kind{http.StatusNotFound, "not found"}
	errMethod     = &kind{http.StatusMethodNotAllowed, "method not allowed"}
	errCondition  = &kind{http.StatusPreconditionFailed, "precondition failed"}
	errTooLarge   = &kind{http.StatusRequestEntityTooLarge, "blob too large"}
	errRange      = &kind{http.StatusRequestedRangeNotSatisfiable, "range not satisfiable"}
	errCorrupt    = &kind{http.StatusInternalServerError, "shard is corrupt"}
	errBusy       = &kind{http.StatusServiceUnavailable, "too busy, try again"}
	errStopping   = &kind{http.StatusServiceUnavailable, "server is stopping"}
	errFull       = &kind{http.StatusInsufficientStorage, "disk full"}
	errAccess     = &kind{http.StatusInternalServerError, "shard cannot be opened"} // nothing is known of what is in it
	errInternal   = &kind{http.StatusInternalServerError, "internal error"}         // of what has no kind

	errNoBlob     = fmt.Errorf("%w: no blob under this key", errNotFound)
	errClientGone = errors.New("the client broke off") // nobody to answer
	errInUse      = errors.New("in use by another blobnom")
)

// applicationID marks our files in the SQLite header ("Blob"), schemaVersion
// is the header's user_version: what file(1) and PRAGMAs show.
const (
	applicationID = 0x426c6f62
	schemaVersion = 1
)

// schema is a shard. A blob of at most one chunk lies in its row; a larger
// one lies in chunks under ids that begin with the blob's id. At every
// instant each content id that chunks mention is either a row of blobs or in
// orphans, so a crash leaves the old content or the new one, and orphans is
// exactly what may be swept.
const schema = `
CREATE TABLE blobs (
	id           INTEGER PRIMARY KEY, -- of the content; a new one whenever chunks come or go
	key          TEXT NOT NULL UNIQUE,
	size         INTEGER NOT NULL,    -- bytes as the client sees them
	sha256       BLOB NOT NULL,       -- of those bytes
	codec        INTEGER NOT NULL,    -- of the content as it lies here: 0 identity, 1 deflate
	stored       INTEGER NOT NULL,    -- bytes of the content as it lies here
	crc32        INTEGER,             -- of the bytes the client sees, for the gzip trailer; NULL for identity
	content_type TEXT NOT NULL,
	created_at   INTEGER NOT NULL,    -- Unix milliseconds, as are the next two
	updated_at   INTEGER NOT NULL,
	expires_at   INTEGER,             -- NULL: never
	version      INTEGER NOT NULL,    -- 0 at creation, +1 a replacement
	data         BLOB                 -- NULL: in chunks; last, so that metadata reads skip it
);
CREATE INDEX expiring ON blobs (expires_at) WHERE expires_at IS NOT NULL; -- who never expires pays nothing
CREATE TABLE chunks  (id INTEGER PRIMARY KEY, data BLOB NOT NULL); -- id = content id << 20 | sequence
CREATE TABLE orphans (id INTEGER PRIMARY KEY); -- content ids whose chunks nothing refers to (yet, or any more)
CREATE TABLE meta    (key TEXT PRIMARY KEY, value); -- num_shards, shard, hash, directory
CREATE TABLE totals  (blobs INTEGER NOT NULL, bytes INTEGER NOT NULL, orphans INTEGER NOT NULL); -- one row, kept by the triggers; bytes as clients see them
INSERT INTO totals VALUES (0, 0, 0);
CREATE TRIGGER blob_added    AFTER INSERT ON blobs BEGIN UPDATE totals SET blobs = blobs + 1, bytes = bytes + new.size; END;
CREATE TRIGGER blob_replaced AFTER UPDATE OF size ON blobs WHEN new.size <> old.size BEGIN UPDATE totals SET bytes = bytes + new.size - old.size; END;
CREATE TRIGGER blob_removed  AFTER DELETE ON blobs BEGIN UPDATE totals SET blobs = blobs - 1, bytes = bytes - old.size; END;
CREATE TRIGGER orphan_added   AFTER INSERT ON orphans BEGIN UPDATE totals SET orphans = orphans + 1; END;
CREATE TRIGGER orphan_removed AFTER DELETE ON orphans BEGIN UPDATE totals SET orphans = orphans - 1; END;
`

// blob is one committed or soon to be committed content with its metadata.
// It is immutable once a reader or the queue has it; after a put that was
// waited for, its data belongs to others.
type blob struct {
	id               int64
	size             int64 // as the client sees it
	stored           int64 // as it lies in the shard
	codec            codec
	crc              uint32 // of a deflated content
	sum              [sha256.Size]byte
	contentType      string
	created, updated int64 // Unix milliseconds
	expires          int64 // Unix milliseconds; 0: never
	version          int64
	data             []byte     // content as it lies, or, when chunked and being written, its last chunk
	header           [10]string // values of an answer that carries this blob: see setHeader
}

// codec says how a content lies in the shard.
type codec int64

const (
	identity codec = 0
	deflated codec = 1 // see Codec
)

// chunked reports whether the content lies in the chunks table. Size alone
// decides, so no reader has to look at the data column.
func (b *blob) chunked() bool { return b.size > chunkSize }

// lastSeq is the sequence number of the last chunk of a chunked blob.
func (b *blob) lastSeq() int64 { return (b.size - 1) / chunkSize }

// fits returns an errCorrupt unless n bytes of data are what b, which is not
// chunked, says of it.
func (b *blob) fits(n int) error {
	if b.size < 0 || int64(n) != b.stored || b.codec == identity && b.stored != b.size {
		return fmt.Errorf("%w: %d bytes lie there where %d were stored, of a content of %d", errCorrupt, n, b.stored, b.size)
	}
	return nil
}

// expired reports whether the blob is gone at now, in Unix milliseconds: from
// the moment that expires names.
func (b *blob) expired(now int64) bool { return b.expires != 0 && b.expires <= now }

// ============================================================================
// Commands
//
// main is a shell around run, which tests call too. One table is both the
// dispatch and the usage text. Exit codes: 0 done, 1 failed or refused, 2 wrong
// usage or wrong configuration. Results go to stdout, logs to stderr.
// ============================================================================

func main() {
	os.Exit(run(context.Background(), os.Args[1:], os.Environ(), os.Stdout, os.Stderr))
}

// command is one row of the command table.
type command struct {
	name, args, help string
	run              func(ctx context.Context, c *call) error
}

// call is one invocation of a command.
type call struct {
	configFile     string
	environ        []string
	args           []string
	stdout, stderr io.Writer
}

func commands() []command {
	return []command{
		{"serve", "", "run the server (the default command)", cmdServe},
		{"check", "[DIR]", "verify a data directory: structure, placement, every checksum", cmdCheck},
		{"backup", "DIR", "copy the data directory into DIR, also while the server runs", cmdBackup},
		{"migrate", "[-codec gzip] [-gunzip] [-skip-invalid] SRC", "copy every blob of SRC into the configured, new data directory", cmdMigrate},
		{"sign", "[-method GET] [-ttl 1h] KEY", "print a signed URL path for KEY that expires", cmdSign},
		{"version", "", "print the version", cmdVersion},
	}
}

func usage(w io.Writer) {
	fmt.Fprint(w, "usage: blobnom [-config FILE] [COMMAND] [ARGUMENTS]\n\n")
	for _, c := range commands() {
		fmt.Fprintf(w, "  %s\n        %s\n", strings.TrimSpace(c.name+" "+c.args), c.help)
	}
	fmt.Fprint(w, "\n  -config FILE\n        configuration (default config.toml, else the built-in example)\n  -h    print this\n")
}

// run executes one command line and returns the exit code.
func run(ctx context.Context, args, environ []string, stdout, stderr io.Writer) int {
	flags := flag.NewFlagSet("blobnom", flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	configFile := flags.String("config", "", "")
	if err := flags.Parse(args); errors.Is(err, flag.ErrHelp) {
		usage(stdout)
		return 0
	} else if err != nil {
		return misuse(stderr, err.Error())
	}
	name, rest := "serve", flags.Args()
	if len(rest) > 0 {
		name, rest = rest[0], rest[1:]
	}
	all := commands()
	i := slices.IndexFunc(all, func(c command) bool { return c.name == name })
	if i < 0 {
		return misuse(stderr, fmt.Sprintf("unknown command %q", name))
	}
	err := all[i].run(ctx, &call{*configFile, environ, rest, stdout, stderr})
	switch {
	case err == nil:
		return 0
	case errors.Is(err, flag.ErrHelp):
		usage(stdout)
		return 0
	case errors.As(err, new(usageError)):
		return misuse(stderr, name+": "+err.Error())
	}
	fmt.Fprintln(stderr, "blobnom:", err)
	if errors.As(err, new(*configError)) {
		return 2
	}
	return 1
}

func misuse(stderr io.Writer, problem string) int {
	fmt.Fprintf(stderr, "blobnom: %s\n\n", problem)
	usage(stderr)
	return 2
}

// usageError says what is wrong with a command's arguments.
type usageError string

func (e usageError) Error() string { return string(e) }

// parse parses the arguments of a command by flags, which may be nil, and
// returns those that are left: at least least and at most most.
func (c *call) parse(flags *flag.FlagSet, least, most int) ([]string, error) {
	if flags == nil {
		flags = flag.NewFlagSet("", flag.ContinueOnError)
	}
	flags.SetOutput(io.Discard)
	err := flags.Parse(c.args)
	switch left := flags.Args(); {
	case errors.Is(err, flag.ErrHelp):
		return nil, err
	case err != nil:
		return nil, usageError(err.Error())
	case len(left) < least:
		return nil, usageError("an argument is missing")
	case len(left) > most:
		return nil, usageError(fmt.Sprintf("there is no argument %q", left[most]))
	default:
		return left, nil
	}
}

func cmdVersion(_ context.Context, c *call) error {
	if _, err := c.parse(nil, 0, 0); err != nil {
		return err
	}
	_, err := fmt.Fprintf(c.stdout, "blobnom %s %s %s/%s\n", version, runtime.Version(), runtime.GOOS, runtime.GOARCH)
	return err
}

// cmdServe runs until SIGTERM, SIGINT or the end of ctx, then drains. A
// second signal meets the default handler and ends the process at once.
func cmdServe(ctx context.Context, c *call) (err error) {
	if _, err := c.parse(nil, 0, 0); err != nil {
		return err
	}
	cfg, source, err := loadConfig(c.configFile, c.environ)
	if err != nil {
		return err
	}
	log := newLogger(cfg, c.stderr)
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM)
	defer stop()
	// The port before the directory: a server that cannot listen leaves no trace.
	ln, err := net.Listen("tcp", cfg.Addr)
	if err != nil {
		return fmt.Errorf("cannot listen on addr %q: %w", cfg.Addr, err)
	}
	defer ln.Close()
	if err := unfinished(cfg.DataDir); err != nil {
		return err
	}
	st, err := openStore(cfg, log, time.Now)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, st.close()) }()

	log.Info("serving", append([]any{"version", version, "listen", ln.Addr().String(), "config", source}, cfg.logArgs()...)...)
	if host := ln.Addr().(*net.TCPAddr).IP; !host.IsLoopback() && cfg.AuthToken == "" {
		log.Warn("anyone who can reach this address can read, replace and delete every blob; set auth_token, or addr to 127.0.0.1, or keep it behind a firewall", "listen", ln.Addr().String())
	}
	return newServer(cfg, st, log).serve(ctx, stop, ln)
}

// cmdSign prints a path that needs no token until it expires.
func cmdSign(_ context.Context, c *call) error {
	flags := flag.NewFlagSet("", flag.ContinueOnError)
	method := flags.String("method", http.MethodGet, "")
	ttl := flags.Duration("ttl", time.Hour, "")
	args, err := c.parse(flags, 1, 1)
	if err != nil {
		return err
	}
	key := args[0]
	if err := checkKey(key); err != nil {
		return usageError(err.Error())
	}
	if *ttl < time.Second || !slices.Contains(strings.Split(blobMethods, ", "), *method) {
		return usageError(fmt.Sprintf("-ttl is at least 1s and -method one of %s", blobMethods))
	}
	cfg, source, err := loadConfig(c.configFile, c.environ)
	if err != nil {
		return err
	}
	if cfg.AuthToken == "" {
		return &configError{source, []string{"auth_token: is empty; a signature needs it as its key"}}
	}
	expires := strconv.FormatInt(time.Now().Add(*ttl).Unix(), 10)
	_, err = fmt.Fprintf(c.stdout, "%s?expires=%s&sig=%s\n", keyPath(key), expires, sign(cfg.AuthToken, *method, key, expires))
	return err
}

func newLogger(cfg *config, w io.Writer) *slog.Logger {
	var level slog.Level
	level.UnmarshalText([]byte(cfg.LogLevel)) // one of four checked words
	opts := &slog.HandlerOptions{Level: level}
	if cfg.LogFormat == "json" {
		return slog.New(slog.NewJSONHandler(w, opts))
	}
	return slog.New(slog.NewTextHandler(w, opts))
}

// ============================================================================
// Configuration
//
// The tags of config name every key and what it may be. A value comes from the
// environment, else the file, else the default. All problems are reported
// together, before anything is opened or created. A BLOBNOM_ variable that names
// no key is not ours to judge.
// ============================================================================

//go:embed config.toml.example
var exampleConfig string

// config is the effective configuration; immutable after loadConfig. Its tags
// are the table of keys.
type config struct {
	DataDir            string `key:"data_dir" required:"true"`
	NumShards          int64  `key:"num_shards" required:"true" min:"1"`
	StorageCompression bool   `key:"storage_compression"`
	OutputCompression  bool   `key:"output_compression"`
	AsyncWrite         bool   `key:"async_write"`
	BatchSize          int64  `key:"batch_size" default:"1" min:"1"`
	BatchTimeoutMS     int64  `key:"batch_timeout_ms" min:"0"`
	Addr               string `key:"addr" default:"0.0.0.0:3000"`
	Durability         string `key:"durability" default:"full" oneof:"full normal off"`
	Hash               string `key:"hash" default:"fnv1a" oneof:"fnv1a crc32c sha256"`
	MaxBlobBytes       int64  `key:"max_blob_bytes" default:"1073741824" min:"0"`
	MaxPendingBytes    int64  `key:"max_pending_bytes" default:"67108864" min:"1"`
	AuthToken          string `key:"auth_token"`
	PublicRead         bool   `key:"public_read"`
	TLSCert            string `key:"tls_cert"` // see pair
	TLSKey             string `key:"tls_key"`
	CORSOrigin         string `key:"cors_origin"`
	LogFormat          string `key:"log_format" default:"text" oneof:"text json"`
	LogLevel           string `key:"log_level" default:"info" oneof:"debug info warn error"`
}

// option is one key of a config.
type option struct {
	key   string
	tag   reflect.StructTag
	value reflect.Value // of the field
}

// options returns the keys of c.
func (c *config) options() (all []option) {
	fields := reflect.ValueOf(c).Elem()
	for i := range fields.NumField() {
		tag := fields.Type().Field(i).Tag
		all = append(all, option{tag.Get("key"), tag, fields.Field(i)})
	}
	return all
}

func defaultConfig() *config {
	c := &config{}
	for _, o := range c.options() {
		if text, ok := o.tag.Lookup("default"); ok {
			o.set(text, true)
		}
	}
	return c
}

// set stores value, a string to be parsed when fromText, and returns what is
// wanted instead when it does not fit.
func (o *option) set(value any, fromText bool) (want string) {
	switch o.value.Kind() {
	case reflect.Int64:
		want = "must be a whole number"
		if fromText {
			if n, err := strconv.ParseInt(value.(string), 10, 64); err == nil {
				value = n
			}
		}
	case reflect.Bool:
		want = "must be true or false"
		if fromText && (value == "true" || value == "false") {
			value = value == "true"
		}
	default:
		want = "must be a string"
	}
	v := reflect.ValueOf(value)
	if v.Kind() != o.value.Kind() {
		return want
	}
	o.value.Set(v)
	return o.check()
}

// check returns what the value has to be, "" when it is that.
func (o *option) check() string {
	if least, ok := o.tag.Lookup("min"); ok {
		if n, _ := strconv.ParseInt(least, 10, 64); o.value.Int() < n {
			return "must be at least " + least
		}
	}
	text := o.value.String()
	if words := strings.Fields(o.tag.Get("oneof")); len(words) > 0 && !slices.Contains(words, text) {
		return "must be one of " + strings.Join(words, ", ")
	}
	switch o.key {
	case "data_dir":
		if text == "" || strings.ContainsRune(text, 0) {
			return "must name a directory"
		}
	case "addr":
		_, port, err := net.SplitHostPort(text)
		if _, perr := strconv.ParseUint(port, 10, 16); err != nil || perr != nil {
			return `must be HOST:PORT, such as "127.0.0.1:3000"`
		}
	case "auth_token":
		if strings.ContainsFunc(text, func(r rune) bool { return r <= ' ' || r > '~' }) {
			return "must be visible ASCII without spaces"
		}
	case "cors_origin":
		u, err := url.Parse(text)
		if text != "" && text != "*" && (err != nil || u.Host == "" || text != u.Scheme+"://"+u.Host) {
			return `must be an origin such as "https://example.org", or "*"`
		}
	}
	return ""
}

// logArgs is the effective configuration for the start line.
func (c *config) logArgs() (args []any) {
	for _, o := range c.options() {
		args = append(args, o.key, shown(o.key, o.value.Interface()))
	}
	return args
}

// shown is the value of key as logs and errors show it.
func shown(key string, value any) any {
	switch value.(type) {
	case string, int64, float64, bool:
		if value == "" || !secretive(key) && !strings.Contains(fmt.Sprint(value), pemBegin) {
			return value
		}
		return "(secret)"
	}
	return "(not a plain value)" // who knows what is in it
}

// secretive reports whether text, perhaps misspelt, is about a token or has a
// private key.
func secretive(text string) bool {
	return strings.Contains(text, pemBegin) || slices.ContainsFunc([]string{"tok", "auth", "secret", "pass"}, func(word string) bool {
		return strings.Contains(strings.ToLower(text), word)
	})
}

const pemBegin = "-----BEGIN"

// pair returns what is wrong with tls_cert and tls_key.
func (c *config) pair() error {
	if c.TLSCert == "" && c.TLSKey == "" {
		return nil
	}
	if c.TLSCert == "" || c.TLSKey == "" {
		return errors.New("both or neither must be set")
	}
	if strings.Contains(c.TLSCert+c.TLSKey, pemBegin) {
		return errors.New("they must name files")
	}
	_, err := tls.LoadX509KeyPair(c.TLSCert, c.TLSKey)
	return err
}

// configError lists every problem of a configuration, one a line.
type configError struct {
	source   string
	problems []string
}

func (e *configError) Error() string {
	return fmt.Sprintf("wrong configuration (%s):\n  %s", e.source, strings.Join(e.problems, "\n  "))
}

// loadConfig reads the configuration and says where it came from. file may be
// empty: config.toml if there is one, else the embedded example. Every error
// is a *configError.
func loadConfig(file string, environ []string) (*config, string, error) {
	text, source := exampleConfig, "built-in config.toml.example"
	values, problems := map[string]any{}, []string(nil)
	if name := cmp.Or(file, "config.toml"); file != "" || fileExists(name) {
		data, err := os.ReadFile(name)
		if err != nil {
			problems = append(problems, err.Error())
		}
		text, source = string(data), name
	}
	if _, err := toml.Decode(text, &values); err != nil {
		problems = append(problems, "not valid TOML: "+tomlProblem(err, text))
	}
	unread := problems != nil
	c, paired := defaultConfig(), true
	for _, o := range c.options() {
		value, given := values[o.key]
		delete(values, o.key)
		name := o.key
		if env, ok := lookupEnv(environ, "BLOBNOM_"+strings.ToUpper(o.key)); ok {
			value, given, name = env, true, "BLOBNOM_"+strings.ToUpper(o.key)
		}
		if !given {
			if o.tag.Get("required") != "" && !unread {
				problems = append(problems, name+": is required and missing")
			}
			continue
		}
		if want := o.set(value, name != o.key); want != "" {
			paired = paired && !strings.HasPrefix(o.key, "tls_")
			problems = append(problems, fmt.Sprintf("%s = %#v: %s", name, shown(o.key, value), want))
		}
	}
	if err := c.pair(); err != nil && paired {
		problems = append(problems, fmt.Sprintf("tls_cert = %q, tls_key = %q: %v", shown("tls_cert", c.TLSCert), shown("tls_key", c.TLSKey), err))
	}
	for _, key := range slices.Sorted(maps.Keys(values)) {
		problems = append(problems, fmt.Sprintf("%s = %#v: unknown key", key, shown(key, values[key])))
	}
	if problems != nil {
		return nil, source, &configError{source, problems}
	}
	return c, source, nil
}

// tomlProblem is err without what might be of a token.
func tomlProblem(err error, text string) string {
	var p toml.ParseError
	if !errors.As(err, &p) {
		return err.Error()
	}
	lines := strings.Split(text, "\n")
	if n := p.Position.Line; n < 1 || n > len(lines) || secretive(lines[n-1]+p.LastKey) {
		return fmt.Sprintf("line %d cannot be read; strings stand in quotes", n)
	}
	return err.Error()
}

func lookupEnv(environ []string, name string) (string, bool) {
	for _, e := range slices.Backward(environ) {
		if v, ok := strings.CutPrefix(e, name+"="); ok {
			return v, true
		}
	}
	return "", false
}

func fileExists(name string) bool {
	_, err := os.Stat(name)
	return err == nil
}

// sizeOf returns the size of a file, 0 when there is none.
func sizeOf(name string) int64 {
	info, err := os.Stat(name)
	if err != nil {
		return 0
	}
	return info.Size()
}

// fileStamps returns what changes when one of the files does: their sizes and
// times.
func fileStamps(names ...string) (stamps string) {
	for _, name := range names {
		if info, err := os.Stat(name); err == nil {
			stamps += fmt.Sprint(info.Size(), info.ModTime().UnixNano())
		}
		stamps += " "
	}
	return stamps
}

// ============================================================================
// HTTP server
//
// Routes, the adapter every handler runs under, the one place where an error
// becomes a status, deadlines and shutdown. Each request has its own goroutine;
// nothing here holds a lock or a database connection while a client is waited
// for.
// ============================================================================

// server is the HTTP face of a store. It has no storage logic.
type server struct {
	store   *store
	log     *slog.Logger
	cfg     *config
	stall   time.Duration // without progress a client is cut off
	metrics *metrics

	running sync.RWMutex // held for reading by every handler
	closed  bool         // no handler is to begin; guarded by running
}

func newServer(cfg *config, st *store, log *slog.Logger) *server {
	return &server{store: st, log: log, cfg: cfg, stall: stallTimeout, metrics: newMetrics()}
}

// routes returns the handler of everything. The mux would answer a path that
// has to be cleaned with a redirect, to another key: such a path is refused
// before the mux sees it.
func (s *server) routes() http.Handler {
	mux := http.NewServeMux()
	handle := func(pattern string, h handler) {
		mux.Handle(pattern, s.adapt(h))
	}
	handle("GET /blob/{key...}", func(w *response, r *http.Request) error {
		if r.PathValue("key") == "" { // the pattern /blob/{$} would take the key %2F, too
			return s.listBlobs(w, r)
		}
		return s.getBlob(w, r)
	})
	handle("PUT /blob/{key...}", s.putBlob)
	handle("POST /blob/{key...}", s.putBlob)
	handle("DELETE /blob/{key...}", s.deleteBlob)
	handle("/blob/{key...}", allowOnly(blobMethods))
	for path, h := range map[string]handler{
		"/{$}": s.about, "/healthz": s.healthz, "/readyz": s.readyz, "/metrics": s.exposeMetrics,
	} {
		handle("GET "+path, h)
		handle(path, allowOnly("GET, HEAD"))
	}
	handle("/blob", notFound) // else the mux redirects it to /blob/
	handle("/", notFound)
	preflight := s.adapt(func(w *response, r *http.Request) error {
		h := w.Header()
		h.Set("Access-Control-Allow-Methods", blobMethods)
		h.Set("Access-Control-Allow-Headers", "Authorization, Content-Type, Content-Digest, Repr-Digest, Range, If-Range, "+strings.Join(conditionHeaders, ", "))
		h.Set("Access-Control-Max-Age", "86400")
		w.WriteHeader(http.StatusNoContent)
		return nil
	})
	exposed := strings.Join(append(headerNames[:], "Content-Encoding", "Content-Range", "Allow", "Retry-After", "WWW-Authenticate"), ", ")
	unclean := s.adapt(func(*response, *http.Request) error {
		return fmt.Errorf(`%w: the path has an empty, "." or ".." segment; percent-encode what belongs to a key, / as %%2F and . as %%2E`, errBadRequest)
	})
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		r.URL.Path = cmp.Or(r.URL.Path, "/") // GET http://host HTTP/1.1
		r.URL.RawPath = escapeRaw(r.URL.RawPath)
		if s.cfg.CORSOrigin != "" {
			w.Header().Set("Access-Control-Allow-Origin", s.cfg.CORSOrigin)
			w.Header().Set("Access-Control-Expose-Headers", exposed)
		}
		switch {
		case s.cfg.CORSOrigin != "" && isPreflight(r):
			preflight.ServeHTTP(w, r)
		case needsCleaning(r.URL.EscapedPath()):
			unclean.ServeHTTP(w, r)
		default:
			mux.ServeHTTP(w, r)
		}
	})
}

const blobMethods = "GET, HEAD, PUT, POST, DELETE"

// isPreflight reports whether a browser asks what it may ask: it shows no
// token yet.
func isPreflight(r *http.Request) bool {
	return r.Method == http.MethodOptions && r.Header.Get("Access-Control-Request-Method") != ""
}

// authorize returns errToken unless r may do what it asks for. A token or a
// signature that is shown has to be right, even where none is needed.
func (s *server) authorize(r *http.Request) error {
	if s.cfg.AuthToken == "" || isPreflight(r) {
		return nil
	}
	key, q, tokens := r.PathValue("key"), r.URL.Query(), r.Header.Values("Authorization")
	reads := r.Method == http.MethodGet || r.Method == http.MethodHead
	ok := len(tokens) > 0 || q.Has("sig") || strings.HasSuffix(r.Pattern, "/healthz") || strings.HasSuffix(r.Pattern, "/readyz") ||
		s.cfg.PublicRead && reads && key != ""
	if len(tokens) > 0 {
		scheme, token, _ := strings.Cut(tokens[0], " ")
		ok = len(tokens) == 1 && strings.EqualFold(scheme, "Bearer") && hmac.Equal(mac(s.cfg.AuthToken, strings.TrimSpace(token)), mac(s.cfg.AuthToken, s.cfg.AuthToken))
	}
	if q.Has("sig") {
		expires := q.Get("expires")
		until, err := strconv.ParseInt(expires, 10, 64)
		fits := func(method string) bool {
			return hmac.Equal([]byte(q.Get("sig")), []byte(sign(s.cfg.AuthToken, method, key, expires)))
		}
		ok = ok && err == nil && key != "" && s.store.now().Unix() < until && strings.Count(r.URL.RawQuery, "&") == 1 &&
			(fits(r.Method) || r.Method == http.MethodHead && fits(http.MethodGet))
	}
	if !ok {
		return errToken
	}
	return nil
}

// sign returns the signature that lets method be used on key until expires, in
// Unix seconds.
func sign(token, method, key, expires string) string {
	return hex.EncodeToString(mac(token, method+"\n"+key+"\n"+expires))
}

func mac(key, message string) []byte {
	h := hmac.New(sha256.New, []byte(key))
	io.WriteString(h, message)
	return h.Sum(nil)
}

// keyPath is the path of a key, so encoded that nothing cleans it.
func keyPath(key string) string {
	path := "/blob/" + strings.ReplaceAll(url.PathEscape(key), "%2F", "/")
	if needsCleaning(path) {
		path = "/blob/" + strings.ReplaceAll(url.PathEscape(key), ".", "%2E")
	}
	return path
}

// escapeRaw percent-encodes what a client should have in a path that has
// escapes too: else net/url, to make it valid, takes %2F for a plain slash.
func escapeRaw(p string) string {
	var b strings.Builder
	for _, c := range []byte(p) {
		if c <= ' ' || c >= 0x7f || strings.IndexByte("\"<>\\^`{|}", c) >= 0 {
			fmt.Fprintf(&b, "%%%02X", c)
		} else {
			b.WriteByte(c)
		}
	}
	return b.String()
}

// needsCleaning reports whether the mux would redirect p, a path as it was
// sent, to a cleaner one.
func needsCleaning(p string) bool {
	clean := path.Clean(p)
	return p != "" && p != clean && (p != clean+"/" || clean == "/")
}

func notFound(*response, *http.Request) error {
	return fmt.Errorf("%w: blobs are at /blob/KEY", errNotFound)
}

func allowOnly(methods string) handler {
	return func(w *response, _ *http.Request) error {
		w.Header().Set("Allow", methods)
		return fmt.Errorf("%w: allowed are %s", errMethod, methods)
	}
}

// kindOf returns what err means to a client.
func kindOf(err error) *kind {
	k := errInternal
	errors.As(err, &k)
	return k
}

// publicText is what a client is told of err: all of a 4xx, which is about
// the request; of a 5xx only its kind.
func publicText(err error) string {
	if k := kindOf(err); k.status >= 500 {
		return k.text
	}
	return err.Error()
}

// handler answers one request, or returns why not.
type handler func(w *response, r *http.Request) error

// response notes what was answered, for the log and so that an error after
// the first byte is not appended to half a blob. It keeps the deadlines of the
// connection moving while bytes flow, so that a client is cut off a stall after
// its last progress and not before.
type response struct {
	http.ResponseWriter
	status         int
	received, sent int64 // bytes of bodies
	stall          time.Duration
	moved          atomic.Int64 // Unix nanoseconds when the deadlines were
}

// progressed notes progress, of the client or of the answer. Any goroutine may call
// it; errors are left to the read or write that follows.
func (w *response) progressed() {
	now := time.Now()
	if now.UnixNano()-w.moved.Load() < int64(w.stall/progressGrain) {
		return
	}
	w.moved.Store(now.UnixNano())
	rc := http.NewResponseController(w.ResponseWriter)
	rc.SetReadDeadline(now.Add(w.stall))
	rc.SetWriteDeadline(now.Add(w.stall))
}

func (w *response) WriteHeader(status int) {
	if w.status == 0 && status >= 200 {
		w.progressed() // who waited long for its turn has all the time to read the answer
		w.status = status
	}
	w.ResponseWriter.WriteHeader(status)
}

func (w *response) Write(p []byte) (n int, err error) {
	if w.status == 0 {
		w.WriteHeader(http.StatusOK)
	}
	for piece := range slices.Chunk(p, writePiece) {
		w.progressed()
		m, err := w.ResponseWriter.Write(piece)
		n, w.sent = n+m, w.sent+int64(m)
		if err != nil {
			return n, fmt.Errorf("%w: %w", errClientGone, err)
		}
	}
	return n, nil
}

// Unwrap lets http.ResponseController reach the connection.
func (w *response) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// adapt makes an http.Handler of h: it answers the error, logs what was
// answered at debug level and turns a panic into a logged 500.
func (s *server) adapt(h handler) http.Handler {
	return http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		s.running.RLock()
		defer s.running.RUnlock()
		start := time.Now()
		w := &response{ResponseWriter: rw, stall: s.stall}
		w.moved.Store(start.UnixNano())
		defer func() {
			v := recover()
			if v != nil && v != http.ErrAbortHandler {
				v = s.fail(w, r, fmt.Errorf("panic: %v\n%s", v, debug.Stack()))
			}
			took := time.Since(start)
			s.metrics.observe(w, r, took)
			if s.log.Enabled(r.Context(), slog.LevelDebug) {
				s.log.Debug("request", "method", r.Method, "path", r.URL.EscapedPath(), "status", w.status,
					"bytes", w.sent, "duration", took, "client", r.RemoteAddr)
			}
			if v != nil {
				panic(v)
			}
		}()
		err := error(errStopping)
		if !s.closed {
			err = s.authorize(r)
		}
		if err == nil {
			err = h(w, r)
		}
		if err != nil {
			if v := s.fail(w, r, err); v != nil {
				panic(v)
			}
		}
	})
}

// fail answers err. Where the answer has begun or nobody reads it, it returns
// what to panic with for the connection to be cut, so that half an answer cannot
// be taken for a whole one.
func (s *server) fail(w *response, r *http.Request, err error) any {
	if errors.Is(err, errClientGone) {
		s.log.Debug("request cut off", "method", r.Method, "path", r.URL.EscapedPath(), "error", err)
		return http.ErrAbortHandler
	}
	status := kindOf(err).status
	if status >= 500 {
		s.log.Error("request failed", "method", r.Method, "path", r.URL.EscapedPath(), "status", status, "error", err)
	}
	if w.status != 0 {
		return http.ErrAbortHandler
	}
	for _, name := range append(headerNames[:], "Content-Encoding", "Vary") { // of what is not sent after all
		w.Header().Del(name)
	}
	switch status {
	case http.StatusUnauthorized:
		w.Header().Set("WWW-Authenticate", "Bearer")
	case http.StatusServiceUnavailable:
		w.Header().Set("Retry-After", "1")
	case http.StatusRequestEntityTooLarge: // what the client still sends is not worth reading
		w.Header().Set("Connection", "close")
	}
	writeText(w, status, publicText(err)+"\n")
	return nil
}

// writeText answers a short text; it cannot be made to run in a browser.
func writeText(w http.ResponseWriter, status int, text string) {
	h := w.Header()
	h.Set("Content-Type", "text/plain; charset=utf-8")
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Content-Length", strconv.Itoa(len(text)))
	w.WriteHeader(status)
	io.WriteString(w, text) // a client that is gone needs no answer
}

// serve answers requests on ln until ctx ends, then stops accepting, gives
// running requests drainTimeout, cuts off what is left and waits for its
// handlers. stop releases the signal handler, so that a second signal kills.
func (s *server) serve(ctx context.Context, stop func(), ln net.Listener) error {
	// ReadTimeout and WriteTimeout are the first stallTimeout of a request,
	// set by net/http at no extra cost; response.progressed moves them on from there.
	hs := &http.Server{
		Handler:           s.routes(),
		ReadHeaderTimeout: headerTimeout,
		ReadTimeout:       s.stall,
		WriteTimeout:      s.stall,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    64 << 10,
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			return context.WithValue(ctx, connKey{}, c)
		},
		ErrorLog: slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
	}
	failed := make(chan error, 1)
	accept := func() error { return hs.Serve(corkedListener{ln}) }
	if s.cfg.TLSCert != "" {
		pair := &keyPair{cfg: s.cfg, log: s.log}
		hs.TLSConfig = &tls.Config{GetCertificate: pair.get, MinVersion: tls.VersionTLS12}
		accept = func() error { return hs.ServeTLS(ln, "", "") }
	}
	go func() { failed <- accept() }()
	var err error
	select {
	case err = <-failed:
		failed <- err
	case <-ctx.Done():
	}
	stop()
	s.store.hurry()
	s.log.Info("stopping: finishing requests and committing what is queued")
	late, cancel := context.WithTimeout(context.Background(), drainTimeout)
	defer cancel()
	if err := hs.Shutdown(late); err != nil {
		s.log.Warn("requests cut off", "after", drainTimeout)
		hs.Close()
	}
	<-failed       // http.ErrServerClosed
	s.store.halt() // nobody is to wait any more
	s.running.Lock()
	s.closed = true
	s.running.Unlock()
	return err
}

// keyPair is the certificate and key of the configuration, read again when
// their files change. Any goroutine may call get.
type keyPair struct {
	cfg *config
	log *slog.Logger

	mu     sync.Mutex // guards the rest
	files  string     // size and time of both, when they were read
	warned string     // and when they could not be
	pair   *tls.Certificate
}

// get returns the newest pair that could be read: while one file is new and the
// other is not, that is the old one.
func (k *keyPair) get(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	files := fileStamps(k.cfg.TLSCert, k.cfg.TLSKey)
	k.mu.Lock()
	defer k.mu.Unlock()
	if files != k.files {
		pair, err := tls.LoadX509KeyPair(k.cfg.TLSCert, k.cfg.TLSKey)
		if err == nil {
			k.pair, k.files = &pair, files
		} else if files != k.warned { // it is tried again with each connection
			k.warned = files
			k.log.Warn("cannot read the new tls_cert and tls_key, going on with the old ones", "error", err)
		}
	}
	if k.pair == nil {
		return nil, errors.New("no certificate")
	}
	return k.pair, nil
}

// corkedConn gathers what is written between cork and uncork, up to corkBytes,
// and sends it with one system call. net/http sends the header of an answer
// and a body of more than its 4 KiB buffer in two, each of which wakes the
// client: for a small blob that is a quarter of the whole request.
//
// Only the goroutine that serves the connection's request may cork, and it
// uncorks before it returns.
type corkedConn struct {
	net.Conn
	corked *bufio.Writer // nil: not corked
}

const corkBytes = 64 << 10

var corks = sync.Pool{New: func() any { return bufio.NewWriterSize(nil, corkBytes) }}

type connKey struct{}

// cork gathers the answer to r, where its connection can, until the returned
// function is called.
func cork(r *http.Request) (uncork func()) {
	c, ok := r.Context().Value(connKey{}).(*corkedConn)
	if !ok || r.ProtoMajor != 1 {
		return func() {}
	}
	w := corks.Get().(*bufio.Writer)
	w.Reset(c.Conn)
	c.corked = w
	return func() {
		c.corked = nil
		if w.Flush() != nil {
			c.Close() // else the next answer would follow a part of this one
		}
		w.Reset(nil)
		corks.Put(w)
	}
}

func (c *corkedConn) Write(p []byte) (int, error) {
	if c.corked != nil {
		return c.corked.Write(p)
	}
	return c.Conn.Write(p)
}

// CloseWrite lets net/http end an answer that the client is too busy sending
// to read.
func (c *corkedConn) CloseWrite() error {
	if half, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return c.Close()
}

// corkedListener makes every connection a corkedConn.
type corkedListener struct{ net.Listener }

func (l corkedListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return &corkedConn{Conn: c}, nil
}

// ============================================================================
// Handlers
//
// One function per request. A handler checks it, asks the store and describes
// the result in headers; what is no success is an error for the adapter.
// ============================================================================

// checkKey returns an errBadRequest unless key is one.
func checkKey(key string) error {
	switch {
	case key == "":
		return fmt.Errorf("%w: the key is empty", errBadRequest)
	case len(key) > maxKeyBytes:
		return fmt.Errorf("%w: the key has %d bytes, at most %d are allowed", errBadRequest, len(key), maxKeyBytes)
	case !utf8.ValidString(key):
		return fmt.Errorf("%w: the key is not valid UTF-8", errBadRequest)
	case strings.ContainsRune(key, 0):
		return fmt.Errorf("%w: the key has a NUL byte", errBadRequest)
	}
	return nil
}

// locate returns the request's key, checked, and its shard.
func (s *server) locate(r *http.Request) (key string, sh *shard, err error) {
	key = r.PathValue("key")
	if err := checkKey(key); err != nil {
		return "", nil, err
	}
	sh, err = s.store.shardOf(key)
	return key, sh, err
}

// etags returns the entity tags of b's content: as it is, and as it is sent
// with Content-Encoding: gzip. Either names the content.
func (b *blob) etags() (plain, zipped string) {
	sum := hex.EncodeToString(b.sum[:])
	return `"` + sum + `"`, `"` + sum + `-gzip"`
}

// headerNames are the headers of an answer that carries a blob as it is, in the
// order of blob.header.
var headerNames = [...]string{"Content-Type", "Etag", "Repr-Digest", "Blob-Created", "Blob-Updated", "Blob-Version", "Blob-Expires",
	"Content-Length", "Last-Modified", "Accept-Ranges"}

// stamp is how times look in answers.
func stamp(ms int64) string { return time.UnixMilli(ms).UTC().Format("2006-01-02T15:04:05.000Z07:00") }

// renderHeader fills in b.header, once for all answers that carry b.
func (b *blob) renderHeader() {
	plain, _ := b.etags()
	created := stamp(b.created)
	b.header = [...]string{
		b.contentType,
		plain,
		"sha-256=:" + base64.StdEncoding.EncodeToString(b.sum[:]) + ":",
		created,
		created,
		strconv.FormatInt(b.version, 10),
		"",
		strconv.FormatInt(b.size, 10),
		time.UnixMilli(b.updated).UTC().Format(http.TimeFormat),
		"bytes",
	}
	if b.updated != b.created {
		b.header[4] = stamp(b.updated)
	}
	if b.expires != 0 {
		b.header[6] = stamp(b.expires)
	}
}

// What others uploaded neither passes for another type nor runs under our name.
var (
	noSniff = []string{"nosniff"}
	sandbox = []string{"sandbox"}
)

// setHeader describes b in h, without allocating: the values are b's own.
func (b *blob) setHeader(h http.Header) {
	for i, name := range headerNames {
		if b.header[i] != "" {
			h[name] = b.header[i : i+1 : i+1]
		}
	}
	h["X-Content-Type-Options"] = noSniff
	h["Content-Security-Policy"] = sandbox
}

// getBlob serves GET and HEAD. The content holds no connection between
// chunks; http.ServeContent takes the ranges out of it.
func (s *server) getBlob(w *response, r *http.Request) error {
	key, sh, err := s.locate(r)
	if err != nil {
		return err
	}
	c, err := sh.read(key, r.Method == http.MethodHead)
	if err != nil {
		return err
	}
	defer c.close()
	b, h := c.blob, w.Header()
	// net/http refuses units it does not know, and makes bytes 0--1/0 of nothing.
	whole := !strings.HasPrefix(r.Header.Get("Range"), "bytes=") || b.size == 0
	c.zipped = s.cfg.OutputCompression && whole && b.zips() && acceptsGzip(r.Header)
	conditions, _ := conditionsOf(r.Header) // a malformed one is ignored
	if err := conditions.refuse(b); err != nil {
		return err
	}
	if tag := conditions.known(b, c.zipped); tag != "" {
		c.describe(h)
		h.Set("Etag", tag)
		for _, name := range []string{"Content-Type", "Content-Length", "Content-Encoding"} {
			h.Del(name)
		}
		w.WriteHeader(http.StatusNotModified)
		return nil
	}
	if !whole {
		return c.sendRange(w, r)
	}
	if b.size <= cacheItem {
		defer cork(r)()
	}
	if err := c.send(w); err != nil {
		return err
	}
	http.NewResponseController(w).Flush() // into the cork; a client that is gone needs no answer
	return nil
}

// describe describes the whole content in h, as it is sent.
func (c *content) describe(h http.Header) {
	b := c.blob
	b.setHeader(h)
	if c.zipped {
		_, tag := b.etags()
		h.Set("Etag", tag)
		h.Set("Content-Encoding", "gzip")
		h.Set("Vary", "Accept-Encoding") // what goes out as it is suits every client, and every cache
		h.Del("Repr-Digest")             // which is that of the content as it is
		h.Del("Content-Length")
		if b.codec == deflated {
			h.Set("Content-Length", strconv.FormatInt(b.stored+gzipOverhead, 10))
		}
	}
}

// send answers with the whole content, chunk by chunk; between two it holds
// nothing of the shard but the content's id.
func (c *content) send(w *response) error {
	for seq := range c.blob.lastSeq() + 1 {
		var piece []byte
		if !c.headOnly {
			var err error
			if piece, err = c.piece(seq); err != nil {
				return err
			}
		}
		if seq == 0 { // before the first chunk is at hand it can still be an error
			c.describe(w.Header())
			w.WriteHeader(http.StatusOK)
		}
		if c.headOnly {
			return nil
		}
		if _, err := w.Write(piece); err != nil {
			return err
		}
	}
	return nil
}

// sendRange answers with what a Range asks for.
func (c *content) sendRange(w *response, r *http.Request) error {
	for _, name := range conditionHeaders { // decided
		delete(r.Header, name)
	}
	c.describe(w.Header())
	l := &lateResponse{response: w}
	http.ServeContent(l, r, "", c.blob.modified(), c.reader())
	if err := c.close(); err != nil {
		w.Header().Del("Content-Range")
		return err
	}
	if l.status == http.StatusRequestedRangeNotSatisfiable {
		return errRange
	}
	l.begin()
	return nil
}

// lateResponse holds the header back until there is content, so that until then
// the answer can still be an error; http.ServeContent's own errors go nowhere.
type lateResponse struct {
	*response
	status int
}

func (l *lateResponse) WriteHeader(status int) { l.status = status }

func (l *lateResponse) begin() {
	if l.response.status == 0 {
		l.response.WriteHeader(l.status)
	}
}

func (l *lateResponse) Write(p []byte) (int, error) {
	if l.status >= 400 {
		return len(p), nil
	}
	l.begin()
	return l.response.Write(p)
}

// putBlob serves PUT and POST.
func (s *server) putBlob(w *response, r *http.Request) error {
	key, sh, err := s.locate(r)
	if err != nil {
		return err
	}
	for _, name := range []string{"Content-Encoding", "Content-Range"} {
		if v := r.Header.Get(name); v != "" && !strings.EqualFold(v, "identity") {
			return fmt.Errorf("%w: %s is not supported; send the bytes as they shall come back", errBadRequest, name)
		}
	}
	p := &putOptions{contentType: cmp.Or(r.Header.Get("Content-Type"), "application/octet-stream"), length: r.ContentLength}
	if len(p.contentType) > maxContentTypeBytes || !utf8.ValidString(p.contentType) {
		return fmt.Errorf("%w: the Content-Type is longer than %d bytes or not UTF-8", errBadRequest, maxContentTypeBytes)
	}
	if p.ttl, err = ttlOf(r); err != nil {
		return err
	}
	if p.conditions, err = conditionsOf(r.Header); err != nil {
		return err
	}
	if _, err = digestsOf(r.Header); err != nil {
		return err
	}
	p.verify = func(sum []byte) error { return verifyDigests(sum, r.Header, r.Trailer) }
	body := &upload{body: r.Body, limit: s.store.maxBlob, w: w}
	if r.ContentLength > body.limit {
		return body.tooLarge()
	}
	b, queued, err := sh.put(key, body, p)
	if err != nil {
		return err
	}
	plain, _ := b.etags()
	w.Header()["Etag"] = []string{plain}
	if b.expires != 0 {
		w.Header().Set("Blob-Expires", stamp(b.expires))
	}
	w.WriteHeader(writeStatus(queued, http.StatusCreated))
	return nil
}

// deleteBlob serves DELETE. Whether the key existed makes no difference,
// unless a precondition says so.
func (s *server) deleteBlob(w *response, r *http.Request) error {
	key, sh, err := s.locate(r)
	if err != nil {
		return err
	}
	c, err := conditionsOf(r.Header)
	if err != nil {
		return err
	}
	queued, err := sh.remove(key, c)
	if err != nil {
		return err
	}
	w.WriteHeader(writeStatus(queued, http.StatusNoContent))
	return nil
}

func writeStatus(queued bool, committed int) int {
	if queued {
		return http.StatusAccepted
	}
	return committed
}

// listBlobs serves a page of the listing. The page is read and sent piece by
// piece, so it is no snapshot: a key that comes or goes meanwhile may be in it
// or not; every other one is.
func (s *server) listBlobs(w *response, r *http.Request) error {
	q, err := queryOf(r)
	if err != nil {
		return err
	}
	left := defaultPage
	if q.Has("limit") {
		n, err := strconv.ParseUint(q.Get("limit"), 10, 16)
		if left = int(n); err != nil || n < 1 || n > maxPage {
			return fmt.Errorf("%w: limit is not a number from 1 to %d", errBadRequest, maxPage)
		}
	}
	prefix, from := q.Get("prefix"), ""
	if q.Has("after") {
		from = successor(q.Get("after"))
	}
	if !utf8.ValidString(prefix) || !utf8.ValidString(from) {
		return fmt.Errorf("%w: prefix or after is not valid UTF-8", errBadRequest)
	}
	for separator := "\n"; ; {
		page, more, err := s.store.list(prefix, from, min(left, pagePiece))
		if err != nil {
			return err
		}
		if w.status == 0 {
			w.Header().Set("Content-Type", "application/json")
			w.Header()["X-Content-Type-Options"] = noSniff
			io.WriteString(w, `{"blobs":[`)
		}
		for _, row := range page {
			text, err := json.Marshal(row)
			if err != nil {
				return err
			}
			if _, err := fmt.Fprintf(w, "%s%s", separator, text); err != nil {
				return err
			}
			separator = ",\n"
		}
		if left -= len(page); more && left > 0 {
			from = successor(page[len(page)-1].Key)
			continue
		}
		end := "\n]}\n"
		if more {
			next, err := json.Marshal(page[len(page)-1].Key)
			if err != nil {
				return err
			}
			end = "\n],\"next\":" + string(next) + "}\n"
		}
		io.WriteString(w, end) // a client that is gone needs no answer
		return nil
	}
}

// upload is a request body that keeps the deadlines moving, stops at limit and
// tells a client's failure from ours.
type upload struct {
	body  io.Reader
	limit int64
	n     int64
	w     *response
}

func (u *upload) Read(p []byte) (int, error) {
	n, err := u.body.Read(p)
	if u.n += int64(n); u.n > u.limit {
		return n, u.tooLarge()
	}
	if n > 0 {
		u.w.progressed()
		u.w.received += int64(n)
	}
	if err != nil && err != io.EOF {
		err = fmt.Errorf("%w: %w", errClientGone, err)
	}
	return n, err
}

func (u *upload) tooLarge() error {
	return fmt.Errorf("%w: at most %d bytes are allowed", errTooLarge, u.limit)
}

func (s *server) about(w *response, r *http.Request) error {
	base := map[bool]string{false: "http://", true: "https://"}[r.TLS != nil] + r.Host + "/blob/"
	writeText(w, http.StatusOK, "Blobnom "+version+", a small sharded blob server\n\n"+
		"  curl -T FILE "+base+"KEY          store or replace\n"+
		"  curl -o FILE "+base+"KEY          fetch\n"+
		"  curl -I "+base+"KEY               size, type, ETag, dates\n"+
		"  curl -r 0-99 "+base+"KEY          the first 100 bytes\n"+
		"  curl '"+base+"?prefix=P'        list, a page at a time\n"+
		"  curl -X DELETE "+base+"KEY        delete\n\n"+
		"A KEY may have slashes. /healthz says whether the process answers, /readyz whether every shard works, /metrics how it does.\n")
	return nil
}

func (s *server) healthz(w *response, _ *http.Request) error {
	writeText(w, http.StatusOK, "ok\n")
	return nil
}

// readyz asks every shard. It names shards by number and failures by kind.
func (s *server) readyz(w *response, _ *http.Request) error {
	type row struct {
		Shard        int    `json:"shard"`
		Ready        bool   `json:"ready"`
		Error        string `json:"error,omitempty"`
		FailedWrites int64  `json:"failed_background_writes"`
	}
	answer := struct {
		Ready  bool  `json:"ready"`
		Shards []row `json:"shards"`
	}{Ready: true}
	for i, sh := range s.store.shards {
		rw := row{Shard: i, Ready: true, FailedWrites: sh.failedWrites.Load()}
		if err := sh.health(); err != nil {
			rw.Ready, rw.Error, answer.Ready = false, publicText(err), false
		}
		answer.Shards = append(answer.Shards, rw)
	}
	text, err := json.Marshal(answer)
	if err != nil {
		return err
	}
	w.Header().Set("Content-Type", "application/json")
	if !answer.Ready {
		w.WriteHeader(http.StatusServiceUnavailable)
	}
	w.Write(append(text, '\n'))
	return nil
}

// ============================================================================
// Fields
//
// What headers and queries ask for: preconditions, digests, a time to live, an
// encoding. Each parser refuses what it cannot understand, as a write that
// ignored its precondition or its digest would not be the one asked for. Reads
// ignore a malformed condition, as net/http does.
// ============================================================================

// queryOf parses the query of r, where each parameter stands once.
func queryOf(r *http.Request) (url.Values, error) {
	q, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		return nil, fmt.Errorf("%w: the query cannot be parsed", errBadRequest)
	}
	for _, values := range q {
		if len(values) > 1 {
			return nil, fmt.Errorf("%w: a parameter is in the query %d times", errBadRequest, len(values))
		}
	}
	return q, nil
}

// ttlOf returns the time to live that r asks for, 0 for none.
func ttlOf(r *http.Request) (time.Duration, error) {
	q, err := queryOf(r)
	if err != nil || !q.Has("ttl") {
		return 0, err
	}
	text := q.Get("ttl")
	ttl, err := time.ParseDuration(text)
	if seconds, serr := strconv.ParseUint(text, 10, 32); serr == nil { // 32 bits hold more than maxTTL
		ttl, err = time.Duration(seconds)*time.Second, nil
	}
	if err != nil || ttl <= 0 || ttl > maxTTL {
		return 0, fmt.Errorf("%w: ttl is neither a duration such as 90s or 1.5h nor whole seconds, above 0 and up to %.0fh", errBadRequest, maxTTL.Hours())
	}
	return ttl, nil
}

// tags is a list of entity tags as they were sent, "*" alone for any.
type tags []string

var entityTag = regexp.MustCompile(`^((?:W/)?"[^"\x00-\x20\x7f]*")[ \t]*(?:,|$)`)

// tagsOf parses the header called name, nil when there is none. If-None-Match
// compares weakly, so that its tags lose the mark of weak ones, which If-Match,
// comparing strongly, finds equal to none.
func tagsOf(h http.Header, name string) (list tags, err error) {
	if len(h.Values(name)) == 0 {
		return nil, nil
	}
	rest := strings.Trim(strings.Join(h.Values(name), ","), " \t,")
	if rest == "*" {
		return tags{rest}, nil
	}
	for first := true; first || rest != ""; first = false {
		m := entityTag.FindStringSubmatch(rest)
		if m == nil {
			return nil, fmt.Errorf(`%w: %s is neither * nor a list of entity tags such as "abc"`, errBadRequest, name)
		}
		rest = strings.TrimLeft(rest[len(m[0]):], " \t,")
		if name == "If-None-Match" {
			m[1] = strings.TrimPrefix(m[1], "W/")
		}
		list = append(list, m[1])
	}
	return list, nil
}

// find returns the tag of t that names the content of b, "" when none does.
func (t tags) find(b *blob) string {
	if t == nil {
		return ""
	}
	plain, zipped := b.etags()
	for _, tag := range t {
		if tag == "*" || tag == plain || tag == zipped {
			return tag
		}
	}
	return ""
}

// conditionHeaders are decided here, on reads and on writes; If-Range, which
// asks for a part or the whole, is left to http.ServeContent.
var conditionHeaders = []string{"If-Match", "If-None-Match", "If-Unmodified-Since", "If-Modified-Since"}

// conditions are the preconditions of a request.
type conditions struct {
	match, noneMatch     tags      // nil: none
	unmodified, modified time.Time // since; zero: none
}

// conditionsOf parses the preconditions in h, nil when there are none. An
// error names one that is malformed; without it the others are returned.
func conditionsOf(h http.Header) (c *conditions, err error) {
	if !slices.ContainsFunc(conditionHeaders, func(name string) bool { return len(h[name]) > 0 }) {
		return nil, nil
	}
	c = &conditions{}
	c.match, err = tagsOf(h, "If-Match")
	noneMatch, err2 := tagsOf(h, "If-None-Match")
	unmodified, err3 := dateOf(h, "If-Unmodified-Since")
	c.noneMatch, err = noneMatch, cmp.Or(err, err2, err3)
	if c.match == nil { // a tag says more than a date
		c.unmodified = unmodified
	}
	if c.noneMatch == nil {
		c.modified, _ = dateOf(h, "If-Modified-Since") // means nothing on a write
	}
	return c, err
}

func dateOf(h http.Header, name string) (t time.Time, err error) {
	if text := h.Get(name); text != "" {
		if t, err = http.ParseTime(text); err != nil {
			return time.Time{}, fmt.Errorf("%w: %s is no HTTP date", errBadRequest, name)
		}
	}
	return t, nil
}

// refuse returns an errCondition when If-Match or If-Unmodified-Since fails for
// b, the content that is there, nil when there is none.
func (c *conditions) refuse(b *blob) error {
	switch {
	case c == nil:
	case c.match != nil && (b == nil || c.match.find(b) == ""):
		return fmt.Errorf("%w: If-Match does not name what is there", errCondition)
	case !c.unmodified.IsZero() && b != nil && b.modified().After(c.unmodified):
		return fmt.Errorf("%w: it was modified since", errCondition)
	}
	return nil
}

// refuseWrite is refuse for a write, which If-None-Match can refuse as well.
func (c *conditions) refuseWrite(b *blob) error {
	if c != nil && b != nil && c.noneMatch.find(b) != "" {
		return cmp.Or(c.refuse(b), fmt.Errorf("%w: If-None-Match names what is there", errCondition))
	}
	return c.refuse(b)
}

// known returns the tag by which the client of a read has the content b
// already, "" when it does not. Where it did not say, that is the tag of the
// answer it would get.
func (c *conditions) known(b *blob, zipped bool) (tag string) {
	if c == nil {
		return ""
	}
	tag = c.noneMatch.find(b)
	if tag == "*" || !c.modified.IsZero() && !b.modified().After(c.modified) {
		plain, other := b.etags()
		if tag = plain; zipped {
			tag = other
		}
	}
	return tag
}

// modified is when b was, in the whole seconds of an HTTP date.
func (b *blob) modified() time.Time { return time.UnixMilli(b.updated).Truncate(time.Second) }

var digest = regexp.MustCompile(`^[ \t]*([a-z*][a-z0-9_.*-]*)=:([A-Za-z0-9+/]*=*):[ \t]*(?:;.*)?$`)

// digestsOf returns the SHA-256 sums that Repr-Digest and Content-Digest
// announce (RFC 9530). A body is sent as it is, so they mean the same. Other
// algorithms are not known, and ignored.
func digestsOf(h http.Header) (sums [][]byte, err error) {
	for _, name := range []string{"Repr-Digest", "Content-Digest"} {
		if len(h.Values(name)) == 0 {
			continue
		}
		var last []byte // of a member that is there twice the last one counts
		for member := range strings.SplitSeq(strings.Join(h.Values(name), ","), ",") {
			m := digest.FindStringSubmatch(member)
			if m == nil {
				return nil, fmt.Errorf("%w: %s is not a list of digests, such as sha-256=:BASE64:, with commas", errBadRequest, name)
			}
			if m[1] != "sha-256" {
				continue
			}
			encoding := base64.StdEncoding
			if !strings.HasSuffix(m[2], "=") { // which may lack
				encoding = base64.RawStdEncoding
			}
			if last, err = encoding.DecodeString(m[2]); err != nil || len(last) != sha256.Size {
				return nil, fmt.Errorf("%w: the sha-256 of %s is not %d bytes in Base64", errBadRequest, name, sha256.Size)
			}
		}
		if last != nil {
			sums = append(sums, last)
		}
	}
	return sums, nil
}

// verifyDigests returns an errBadRequest unless sum is what the header and the
// trailer of a body announce, which has been read.
func verifyDigests(sum []byte, fields ...http.Header) error {
	for _, h := range fields {
		announced, err := digestsOf(h)
		if err != nil {
			return err
		}
		for _, want := range announced {
			if !bytes.Equal(want, sum) {
				return fmt.Errorf("%w: the body is not what its digest says: its SHA-256 is %x", errBadRequest, sum)
			}
		}
	}
	return nil
}

var (
	weight  = regexp.MustCompile(`^[ \t]*[qQ]=(0(?:\.[0-9]{0,3})?|1(?:\.0{0,3})?)[ \t]*$`)
	textual = regexp.MustCompile(`^(text/.*|application/(json|x-ndjson|javascript|xml|yaml|toml|sql|wasm|rtf|graphql|.*\+(json|xml|yaml))|font/[ot]tf)$`)
)

// acceptsGzip reports whether an Accept-Encoding takes gzip, and does not
// prefer the content as it is. No header means as it is.
func acceptsGzip(h http.Header) bool {
	q := map[string]float64{}
	for element := range strings.SplitSeq(strings.Join(h.Values("Accept-Encoding"), ","), ",") {
		coding, parameter, weighted := strings.Cut(element, ";")
		coding = strings.ToLower(strings.Trim(coding, " \t"))
		q[coding] = 1
		if weighted {
			m := append(weight.FindStringSubmatch(parameter), "0", "0") // what is malformed is not accepted
			q[coding], _ = strconv.ParseFloat(m[1], 64)
		}
	}
	gzip, ok := q["gzip"]
	if !ok {
		gzip, ok = q["x-gzip"]
	}
	if !ok {
		gzip = q["*"]
	}
	return gzip > 0 && gzip >= q["identity"]
}

// zips reports whether b is sent compressed to who accepts that: it lies
// compressed already, or is text enough and large enough to be worth it.
func (b *blob) zips() bool {
	if b.codec == deflated || b.size < minEncode {
		return b.codec == deflated
	}
	mediaType, _, _ := strings.Cut(strings.ToLower(b.contentType), ";")
	return textual.MatchString(strings.TrimSpace(mediaType))
}

// ============================================================================
// Store
//
// The data directory: who may use it, what it says of itself, and which shard
// has a key. This is the only place where keys meet the hash. A directory
// whose record differs from the configuration is refused: placement would
// differ, and keys would seem to be gone.
// ============================================================================

const (
	lockFile    = "blobnom.lock"    // an SQLite file, exclusively locked while a server runs
	reserveFile = "blobnom.reserve" // head-room for a full disk, given up when needed
	newDir      = "blobnom.new"     // where shards are created
	partialFile = "blobnom.partial" // in a directory that backup or migrate has not completed
)

// hashes are the placement functions; a key's shard is the value modulo
// num_shards.
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

// store is an open data directory.
type store struct {
	dir     string
	shards  []*shard
	hash    func(string) uint64
	maxBlob int64
	async   bool // answer once queued
	deflate bool // what gets smaller by it
	budget  *budget
	now     func() time.Time // the only clock that reaches the disk
	log     *slog.Logger
	lock    *sql.DB

	batches, commits *histogram // operations and seconds of the transactions

	// full is set by a write that found no space and cleared by the next put
	// that does; reserved is set while the reserve file exists, without which
	// only deletes may use the disk.
	full, reserved atomic.Bool
	reserveMu      sync.Mutex // guards the reserve file and reserveTried
	reserveTried   time.Time

	stop    chan struct{} // closed by halt
	halt    func()        // ends upkeep and all waiting for room or for a foreign lock; may be called twice
	stopped sync.WaitGroup
}

// shardOf returns the shard that has key, or why it cannot be used.
func (st *store) shardOf(key string) (*shard, error) {
	s := st.shards[st.hash(key)%uint64(len(st.shards))]
	return s, s.broken
}

// record is what each shard knows of its directory.
type record struct {
	NumShards int64
	Shard     int64
	Hash      string
	Directory string // random, the same in all shards
}

// openStore opens the data directory of cfg, creating it when there is
// nothing. It refuses a directory in use, one of another program and one
// whose record does not match. A shard that is corrupt does not keep the
// others from serving; its own keys fail with errCorrupt. now is called by many goroutines.
func openStore(cfg *config, log *slog.Logger, now func() time.Time) (*store, error) {
	dir, err := filepath.Abs(cfg.DataDir)
	if err != nil {
		return nil, err
	}
	if err := refuseForeign(dir); err != nil { // before locking, so that it stays as it is
		return nil, err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("cannot create data_dir: %w", err)
	}
	lock, err := lockDir(dir)
	if err != nil {
		return nil, err
	}
	st, err := openLocked(dir, lock, cfg, log, now)
	if err != nil {
		return nil, errors.Join(err, lock.Close())
	}
	return st, nil
}

// openLocked opens dir, which exists and is locked by lock: with success that is
// the store's, with an error still the caller's.
func openLocked(dir string, lock *sql.DB, cfg *config, log *slog.Logger, now func() time.Time) (_ *store, err error) {
	st := &store{
		dir: dir, lock: lock, hash: hashes[cfg.Hash], async: cfg.AsyncWrite, deflate: cfg.StorageCompression, now: now, log: log,
		maxBlob: min(cmp.Or(cfg.MaxBlobBytes, hardMaxBlob), hardMaxBlob),
		stop:    make(chan struct{}),
		batches: newHistogram(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024), commits: newHistogram(durations...),
	}
	st.halt = sync.OnceFunc(func() { close(st.stop) })
	st.budget = newBudget(cfg.MaxPendingBytes, queueTimeout, st.stop)
	defer func() {
		if err != nil {
			st.closeDatabases()
		}
	}()
	if err := finishCreation(dir); err != nil {
		return nil, fmt.Errorf("cannot finish creating the shards in %s: %w", dir, err)
	}
	found, err := survey(dir)
	if err != nil {
		return nil, err
	}
	if len(found) == 0 {
		if err := createShards(dir, cfg); err != nil {
			return nil, fmt.Errorf("cannot create the shards in %s: %w", dir, err)
		}
	}
	st.reserved.Store(sizeOf(filepath.Join(dir, reserveFile)) == reserveBytes)
	err = st.openShards(cfg, found)
	if errors.Is(err, errFull) { // even opening writes: with the reserve's room it can
		st.dropReserve()
		err = errors.Join(st.closeShards(), st.openShards(cfg, found))
	}
	if err != nil {
		return nil, err
	}
	if err := st.takeReserve(); err != nil {
		log.Warn("no room for the reserve: only reads and deletes will work until there is", "bytes", reserveBytes, "error", err)
	}
	for _, s := range st.shards {
		if s.broken == nil {
			st.stopped.Go(s.upkeep)
		}
	}
	return st, nil
}

// lockDir locks dir until the returned database is closed: that is an SQLite
// file in an exclusive transaction, a lock that works on every platform and ends
// with the process. Where somebody has it the error is an errInUse.
func lockDir(dir string) (*sql.DB, error) {
	// In memory: there is no file to make on a full disk.
	lock := openDB(filepath.Join(dir, lockFile), fmt.Sprintf("_pragma=journal_mode(memory)&_pragma=busy_timeout(%d)", lockTimeout.Milliseconds()))
	lock.SetMaxOpenConns(1) // kept open: the transaction is the lock
	// A change that is never committed: of a file that it may not write SQLite
	// would give everybody an exclusive transaction.
	_, err := lock.Exec("BEGIN EXCLUSIVE; PRAGMA user_version = 1")
	if err == nil {
		return lock, nil
	}
	lock.Close()
	if err = translate(err); errors.Is(err, errBusy) {
		return nil, fmt.Errorf("data directory %s is %w; stop that one first", dir, errInUse)
	}
	return nil, fmt.Errorf("cannot lock data directory %s, is it writable? %w", dir, err)
}

// refuseForeign returns an error where another program's databases are. Where the
// lock file exists the directory is ours, and perhaps in use by this very process:
// reading its files then would drop SQLite's own locks.
func refuseForeign(dir string) error {
	if fileExists(filepath.Join(dir, lockFile)) {
		return nil
	}
	_, err := survey(dir)
	return err
}

// survey returns the shard files in dir, index to whether its header is ours;
// one that is not counts as damaged when it stands beside others of ours, or
// is no database at all. It reads the files themselves, so nobody in this
// process may have them open. A directory of another program is an error.
func survey(dir string) (map[int]bool, error) {
	indexes, err := shardFiles(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("cannot read data_dir: %w", err)
	}
	found := map[int]bool{}
	var foreign error
	for _, i := range indexes {
		path := filepath.Join(dir, shardName(i))
		head, err := readHead(path, 64<<10) // the largest page 1, which has the schema
		if err != nil {
			return nil, fmt.Errorf("cannot read shard: %w", err)
		}
		wal, err := readHead(path+"-wal", 1<<20)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("cannot read shard: %w", err)
		}
		isSQLite := len(head) >= 100 && bytes.HasPrefix(head, []byte("SQLite format 3\x00"))
		found[i] = isSQLite && binary.BigEndian.Uint32(head[68:]) == applicationID
		switch {
		case found[i]:
		case (isSQLite || len(head) == 0) && bytes.Contains(append(head, wal...), []byte("blobs")):
			foreign = fmt.Errorf("%s was written by the Rust Blobnom or Blobasaur; nothing was changed: set data_dir to a new directory and run: blobnom migrate %s", path, dir)
		case isSQLite:
			foreign = fmt.Errorf("%s is a database of another program; nothing was changed: set data_dir to another directory", path)
		}
	}
	if foreign != nil && !slices.Contains(slices.Collect(maps.Values(found)), true) {
		return nil, foreign
	}
	return found, nil
}

func shardName(i int) string { return fmt.Sprintf("shard_%d.db", i) }

func shardIndex(name string) (int, bool) {
	digits, ok1 := strings.CutPrefix(name, "shard_")
	digits, ok2 := strings.CutSuffix(digits, ".db")
	i, err := strconv.Atoi(digits)
	return i, ok1 && ok2 && err == nil && i >= 0 && name == shardName(i)
}

// shardFiles returns the indexes of the shards that lie in dir.
func shardFiles(dir string) (indexes []int, err error) {
	entries, err := os.ReadDir(dir)
	for _, e := range entries {
		if i, ok := shardIndex(e.Name()); ok && !e.IsDir() {
			indexes = append(indexes, i)
		}
	}
	return indexes, err
}

func readHead(path string, n int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, n))
}

// finishCreation makes good for a creation that did not come to its end. As
// long as no shard is in its place, the new ones may be incomplete, and go; once
// one is, all of them are complete, and follow.
func finishCreation(dir string) error {
	from := filepath.Join(dir, newDir)
	made, err := shardFiles(from)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	placed, err2 := shardFiles(dir)
	if err := cmp.Or(err, err2); err != nil {
		return err
	}
	for _, i := range made {
		if len(placed) > 0 && !fileExists(filepath.Join(dir, shardName(i))) {
			if err := os.Rename(filepath.Join(from, shardName(i)), filepath.Join(dir, shardName(i))); err != nil {
				return err
			}
		}
	}
	return os.RemoveAll(from)
}

// createShards makes a new directory's shards, all of them complete before the
// first gets its place: see finishCreation.
func createShards(dir string, cfg *config) error {
	from := filepath.Join(dir, newDir)
	if err := os.Mkdir(from, 0o755); err != nil {
		return err
	}
	id := rand.Text()
	for i := range int(cfg.NumShards) {
		if err := createShard(filepath.Join(from, shardName(i)), record{cfg.NumShards, int64(i), cfg.Hash, id}); err != nil {
			return err
		}
	}
	if err := os.Rename(filepath.Join(from, shardName(0)), filepath.Join(dir, shardName(0))); err != nil {
		return err
	}
	// Else a power loss could take the names after the first write was acknowledged.
	return errors.Join(finishCreation(dir), syncDir(dir), syncDir(filepath.Dir(dir)))
}

func createShard(path string, r record) (err error) {
	db := openDB(path, "")
	defer func() { err = errors.Join(err, db.Close()) }()
	db.SetMaxOpenConns(1) // the pragmas and the transaction belong to one connection
	if _, err := db.Exec("PRAGMA auto_vacuum = INCREMENTAL; BEGIN; " + schema); err != nil {
		return err
	}
	if _, err := db.Exec("INSERT INTO meta VALUES ('num_shards', ?), ('shard', ?), ('hash', ?), ('directory', ?)",
		r.NumShards, r.Shard, r.Hash, r.Directory); err != nil {
		return err
	}
	// WAL comes last, so that all of this stands in the main file, where survey looks.
	_, err = db.Exec(fmt.Sprintf("PRAGMA application_id = %d; PRAGMA user_version = %d; COMMIT; PRAGMA journal_mode = WAL", applicationID, schemaVersion))
	return err
}

// syncDir makes the names in dir durable. Windows has no such call and needs
// none.
func syncDir(dir string) error {
	if runtime.GOOS == "windows" {
		return nil
	}
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// openShards opens every shard and compares what it says of the directory
// with cfg. found is what survey saw before any was created.
func (st *store) openShards(cfg *config, found map[int]bool) error {
	var first *record
	for i := range int(cfg.NumShards) {
		path := filepath.Join(st.dir, shardName(i))
		intact, exists := found[i]
		if !exists && len(found) > 0 {
			return fmt.Errorf("%s is missing; restore it, or the whole directory, from a backup", path)
		}
		sh, r, err := &shard{store: st, index: i}, (*record)(nil), fmt.Errorf("%w: %s has lost its header", errCorrupt, path)
		if intact || len(found) == 0 {
			sh, r, err = openShard(st, i, path, cfg)
		}
		st.shards = append(st.shards, sh)
		switch {
		case errors.Is(err, errCorrupt):
			sh.broken = err
			st.log.Error("shard is corrupt: its keys will be answered 500; restore it from a backup", "shard", i, "error", err)
			continue
		case err != nil:
			return err
		case first == nil:
			first = r
		}
		if r.NumShards != cfg.NumShards || r.Hash != cfg.Hash {
			return fmt.Errorf("data directory %s holds %d shards placed by %s, the configuration asks for num_shards = %d and hash = %q; set them as they were, or copy the blobs into a new data_dir with: blobnom migrate %s",
				st.dir, r.NumShards, r.Hash, cfg.NumShards, cfg.Hash, st.dir)
		}
		if r.Shard != int64(i) || r.Directory != first.Directory {
			return fmt.Errorf("%s belongs elsewhere: it is shard %d of directory %s, not shard %d of %s; put the right file back from a backup",
				path, r.Shard, r.Directory, i, first.Directory)
		}
	}
	if first == nil {
		return fmt.Errorf("no shard in %s can be read; restore the directory from a backup", st.dir)
	}
	for i := range found {
		if i >= int(cfg.NumShards) {
			return fmt.Errorf("%s does not belong to a directory of %d shards; take it away", filepath.Join(st.dir, shardName(i)), cfg.NumShards)
		}
	}
	return nil
}

// listed is a row of a listing.
type listed struct {
	Key         string `json:"key"`
	Size        int64  `json:"size"`
	ContentType string `json:"content_type"`
	ETag        string `json:"etag"`
	Created     string `json:"created"`
	Updated     string `json:"updated"`
	Version     int64  `json:"version"`
	Expires     string `json:"expires,omitempty"`
}

// list returns up to n blobs whose keys begin with prefix, in key order over
// all shards, beginning with the first key that is not below from, and whether
// there are more. It waits for what is queued.
func (st *store) list(prefix, from string, n int) (page []listed, more bool, err error) {
	for _, s := range st.shards {
		if s.broken != nil { // a listing without its keys would be a lie
			return nil, false, s.broken
		}
		s.batcher.settle(everything)
	}
	now := st.now().UnixMilli()
	cursors := make([]*cursor, 0, len(st.shards))
	defer func() {
		for _, c := range cursors {
			err = cmp.Or(err, c.rows.Close())
		}
	}()
	// Shards in order, so that two listings that need the last connection of
	// two shards do not wait for each other.
	for _, s := range st.shards {
		c, err := s.list(max(prefix, from), prefix+afterPrefix, now, n+1)
		if err != nil {
			return nil, false, err
		}
		cursors = append(cursors, c)
		if err := c.next(); err != nil {
			return nil, false, err
		}
	}
	for {
		least := slices.MinFunc(cursors, func(a, b *cursor) int { return strings.Compare(a.key, b.key) })
		if least.key == ended || len(page) == n {
			return page, least.key != ended, nil
		}
		page = append(page, least.row())
		if err := least.next(); err != nil {
			return nil, false, err
		}
	}
}

// UTF-8 has no byte 0xff, so no key does: a prefix and one is above all keys
// with that prefix, one alone above all keys.
const (
	afterPrefix = "\xff"
	ended       = "\xff"
)

// successor is the least string above key, which as a key has no NUL.
func successor(key string) string { return key + "\x00" }

// close commits what is queued and closes everything. Nothing may call the
// store any more.
func (st *store) close() error { return errors.Join(st.closeDatabases(), st.lock.Close()) }

// closeDatabases is close but for the lock, which is kept.
func (st *store) closeDatabases() error {
	st.halt()
	st.stopped.Wait()
	return st.closeShards()
}

// closeShards commits what is queued, gives up the reserve, whose room the
// closing checkpoints may need, and closes the databases.
func (st *store) closeShards() error {
	for _, sh := range st.shards {
		if sh.batcher != nil {
			sh.batcher.close()
		}
	}
	st.dropReserve()
	var errs []error
	for _, sh := range st.shards {
		errs = append(errs, sh.close())
	}
	st.shards = nil
	return errors.Join(errs...)
}

// hurry ends all waiting for more operations: the server is stopping.
func (st *store) hurry() {
	for _, sh := range st.shards {
		if sh.batcher != nil {
			sh.batcher.endWindow()
		}
	}
}

// stopping reports whether halt has been called.
func (st *store) stopping() bool {
	select {
	case <-st.stop:
		return true
	default:
		return false
	}
}

// dbURI is how SQLite is told of the database at path. params are URI
// parameters.
func dbURI(path, params string) string {
	path = filepath.ToSlash(path)
	if !strings.HasPrefix(path, "/") {
		path = "/" + path // a drive letter
	}
	return (&url.URL{Scheme: "file", Path: path, RawQuery: params}).String()
}

// openDB returns a pool for the database at path; nothing is opened yet.
func openDB(path, params string) *sql.DB {
	db, err := sql.Open("sqlite", dbURI(path, params))
	if err != nil {
		panic(err) // only an unknown driver
	}
	return db
}

// openReadOnly is openDB for reading. params are more URI parameters.
func openReadOnly(path, params string) *sql.DB {
	return openDB(path, fmt.Sprintf("mode=ro&_pragma=busy_timeout(%d)%s", busyTimeout.Milliseconds(), params))
}

// openLive calls open with the parameters of openReadOnly for the shard at path,
// which a server may be using.
func openLive(path string, open func(params string) error) error {
	dir := filepath.Dir(path)
	if fileExists(filepath.Join(dir, lockFile)) && unfinished(dir) == nil { // else no server has ever used it
		if err := translate(open("")); !sealed(err) {
			return err
		}
	}
	return openQuietly(path, open)
}

// sealed reports whether err may say that no file can be made beside a database.
func sealed(err error) bool { return errors.Is(err, errAccess) || errors.Is(err, errFull) }

// openQuietly calls open with the parameters of openReadOnly for the database at
// path, which nobody writes to: its files stay as they are.
func openQuietly(path string, open func(params string) error) error {
	if real, err := filepath.EvalSymlinks(path); err == nil {
		path = real // where SQLite looks for the others
	}
	if sizeOf(path+"-wal") == 0 && sizeOf(path+"-journal") == 0 {
		return translate(open("&immutable=1")) // else a WAL would be made
	}
	err := translate(open(""))
	if sealed(err) {
		// Where no -shm can be made: without locks, the WAL's index in memory.
		// Only there: where files can be removed, closing it would delete a WAL
		// without a whole transaction.
		vfs := "unix-none"
		if runtime.GOOS == "windows" {
			vfs = "win32-none"
		}
		err = translate(open("&vfs=" + vfs + "&_pragma=locking_mode(exclusive)"))
	}
	return err
}

// refuseEmpty returns an error where the database at path has no bytes: to open it
// would delete a WAL that may have all its content.
func refuseEmpty(path string) error {
	if sizeOf(path) == 0 {
		return errors.New("the file is missing or empty")
	}
	return nil
}

// translate gives a driver error the meaning the other chapters test for.
func translate(err error) error {
	var e *sqlite.Error
	if !errors.As(err, &e) || kindOf(err) != errInternal { // not the driver's, or translated already
		return err
	}
	code := e.Code() & 0xff
	switch {
	case code == sqlite3.SQLITE_FULL, e.Code() == sqlite3.SQLITE_IOERR_SHMSIZE: // the -shm file could not grow
		return fmt.Errorf("%w: %w", errFull, err)
	case code == sqlite3.SQLITE_CORRUPT, code == sqlite3.SQLITE_NOTADB:
		return fmt.Errorf("%w: %w", errCorrupt, err)
	case code == sqlite3.SQLITE_BUSY, code == sqlite3.SQLITE_LOCKED:
		return fmt.Errorf("%w: %w", errBusy, err)
	case code == sqlite3.SQLITE_CANTOPEN, code == sqlite3.SQLITE_READONLY, code == sqlite3.SQLITE_PERM:
		return fmt.Errorf("%w, is it readable, and may files be made beside it? %w", errAccess, err) // as a WAL needs
	}
	return err
}

// ============================================================================
// Shard
//
// One database: a pool of readers, one writer behind a batcher, and the ids
// of contents in use. Request goroutines read, put and remove; they
// return when the write is committed (or queued, in async mode) or the content
// is ready to be read.
// ============================================================================

type shard struct {
	store   *store
	index   int
	broken  error // set at open, for good: nothing else of the shard works
	readers *sql.DB
	whole   *sql.Stmt // a row by key
	head    *sql.Stmt // a row by key, without its content
	page    *sql.Stmt // rows by a range of keys, without their content
	chunk   *sql.Stmt
	totals  *sql.Stmt
	look    *sql.Stmt // whether some blob has expired, and whether there are orphans
	writer  *writer
	batcher *batcher
	cache   *cache
	nextID  atomic.Int64 // content ids: each is handed out once in a run

	// Contents that a reader or an upload needs, and the sweep leaves alone.
	// lookups is held for reading from before a row is read until its content
	// stands in held; who holds it for writing knows that every content that
	// any reader found stands there.
	lookups sync.RWMutex
	heldMu  sync.Mutex
	held    map[int64]int // uses by content id; guarded by heldMu

	corrupt      atomic.Bool           // seen by a read or a write; stays
	failure      atomic.Pointer[error] // of the last write, other than a full disk
	failedWrites atomic.Int64          // writes that failed after their 202
	upkeepDue    atomic.Bool           // upkeep has something to look for
	upkeepNow    chan struct{}         // capacity 1: and not only at its next tick
	writes       atomic.Int64          // committed
	seenWrites   int64                 // of writes, when upkeep last looked; upkeep's own
}

const blobColumns = `id, size, stored, codec, coalesce(crc32, 0), sha256, content_type, created_at, updated_at, coalesce(expires_at, 0), version`

const pageQuery = `SELECT key, ` + blobColumns + ` FROM blobs
	WHERE key >= ? AND key < ? AND (expires_at IS NULL OR expires_at > ?) ORDER BY key LIMIT ?`

const chunkQuery = `SELECT data FROM chunks WHERE id = ?`

const debrisQuery = `SELECT EXISTS (SELECT 1 FROM blobs WHERE expires_at <= ?), EXISTS (SELECT 1 FROM orphans)`

// openShard opens one database file and starts its batcher. On an error the
// shard is returned all the same, closed.
func openShard(st *store, i int, path string, cfg *config) (_ *shard, _ *record, err error) {
	s := &shard{store: st, index: i, held: map[int64]int{}, upkeepNow: make(chan struct{}, 1), cache: newCache(cacheBytes / int(cfg.NumShards))}
	defer func() {
		if err != nil {
			err = fmt.Errorf("cannot open %s: %w", path, translate(err))
			s.close()
		}
	}()
	if s.writer, err = openWriter(path, cfg.Durability); err != nil {
		return s, nil, err
	}
	r, err := recordOf(s.writer.db)
	if err != nil {
		return s, nil, err
	}
	last, err := s.writer.lastID()
	if err != nil {
		return s, nil, err
	}
	s.nextID.Store(last)
	s.writer.newID, s.writer.now, s.writer.room = s.newID, st.now, st.room
	if err := s.openReaders(path, fmt.Sprintf("&_pragma=cache_size(-%d)", readerCacheKiB)); err != nil {
		return s, nil, err
	}
	s.upkeepDue.Store(true) // an earlier run may have left some
	s.batcher = newBatcher(int(cfg.BatchSize), time.Duration(min(cfg.BatchTimeoutMS, math.MaxInt64/int64(time.Millisecond)))*time.Millisecond, s.commit)
	go s.batcher.run()
	return s, r, nil
}

// openReaders opens the shard at path for reading. params are more URI
// parameters.
func (s *shard) openReaders(path, params string) (err error) {
	s.readers = openReadOnly(path, params)
	s.readers.SetMaxOpenConns(readersPerShard)
	s.readers.SetMaxIdleConns(readersPerShard)
	for stmt, text := range map[**sql.Stmt]string{
		&s.whole:  "SELECT " + blobColumns + ", data FROM blobs WHERE key = ?",
		&s.head:   "SELECT " + blobColumns + ", NULL FROM blobs WHERE key = ?",
		&s.page:   pageQuery,
		&s.chunk:  chunkQuery,
		&s.look:   debrisQuery,
		&s.totals: "SELECT blobs, bytes, orphans FROM totals",
	} {
		if *stmt, err = s.readers.Prepare(text); err != nil {
			return err
		}
	}
	return nil
}

// close closes the database; its batcher has ended.
func (s *shard) close() error {
	var errs []error
	if s.readers != nil { // before the writer, whose close then checkpoints
		errs = append(errs, s.readers.Close())
	}
	if s.writer != nil {
		errs = append(errs, s.writer.db.Close())
	}
	return errors.Join(errs...)
}

// note translates err and remembers a corruption, for health.
func (s *shard) note(err error) error {
	if err = translate(err); errors.Is(err, errCorrupt) {
		s.corrupt.Store(true)
	}
	return err
}

// health reads from the shard and reports how its last write went.
func (s *shard) health() error {
	if s.broken != nil {
		return s.broken
	}
	if s.corrupt.Load() {
		return errCorrupt
	}
	if failure := s.failure.Load(); failure != nil {
		return *failure
	}
	if s.store.pressed() {
		return errFull
	}
	var n int
	return translate(s.readers.QueryRow("SELECT count(*) FROM (SELECT 1 FROM blobs LIMIT 1)").Scan(&n))
}

// read returns the content under key, or errNotFound. The caller closes it.
// headOnly leaves the content itself on the disk.
func (s *shard) read(key string, headOnly bool) (*content, error) {
	s.batcher.settle(key)
	if b := s.cache.get(key); b != nil {
		return &content{shard: s, blob: b, headOnly: headOnly}, s.live(b)
	}
	s.lookups.RLock()
	defer s.lookups.RUnlock()
	if headOnly {
		b, err := s.lookup(s.head, key)
		return &content{shard: s, blob: b, headOnly: true}, err
	}
	place := s.cache.reserve(key) // before the row is read: see cache
	b, err := s.lookup(s.whole, key)
	s.cache.fill(key, place, b)
	if err != nil {
		return nil, err
	}
	c := &content{shard: s, blob: b, held: b.chunked()}
	if c.held {
		s.hold(b.id)
	}
	return c, nil
}

// live returns an errNotFound when b has expired: a cached one may have.
func (s *shard) live(b *blob) error {
	if b.expires != 0 && b.expired(s.store.now().UnixMilli()) {
		return errNoBlob
	}
	return nil
}

// lookup reads one row by stmt.
func (s *shard) lookup(stmt *sql.Stmt, key string) (_ *blob, err error) {
	defer func() { err = s.note(err) }()
	rows, err := stmt.Query(key)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	if !rows.Next() {
		if err := rows.Err(); err != nil {
			return nil, err
		}
		return nil, errNoBlob
	}
	var data sql.RawBytes
	b, err := scanBlob(rows, nil, &data)
	if err != nil {
		return nil, err
	}
	if stmt == s.whole && !b.chunked() {
		if err := b.fits(len(data)); err != nil {
			return nil, err
		}
		b.data = bytes.Clone(data)
	}
	if err := s.live(b); err != nil {
		return nil, err
	}
	b.renderHeader()
	return b, nil
}

// scanBlob scans a row that begins with blobColumns, or with a key before
// them, and ends with its data or without. An error beside a blob is about that.
func scanBlob(rows *sql.Rows, key *string, data *sql.RawBytes) (*blob, error) {
	b := &blob{}
	var sum, contentType sql.RawBytes
	to := make([]any, 0, 13)
	if key != nil {
		to = append(to, key)
	}
	to = append(to, &b.id, &b.size, &b.stored, &b.codec, &b.crc, &sum, &contentType, &b.created, &b.updated, &b.expires, &b.version)
	if data != nil {
		to = append(to, data)
	}
	if err := rows.Scan(to...); err != nil {
		return nil, err
	}
	if copy(b.sum[:], sum) != len(b.sum) {
		return b, fmt.Errorf("%w: a SHA-256 of %d bytes", errCorrupt, len(sum))
	}
	if b.codec != identity && b.codec != deflated {
		return b, fmt.Errorf("%w: codec %d is unknown", errCorrupt, b.codec)
	}
	b.contentType = string(contentType)
	return b, nil
}

// cursor goes through the rows of one shard for a listing.
type cursor struct {
	shard *shard
	rows  *sql.Rows
	key   string // of the row at hand, ended after the last
	blob  *blob
}

// list returns a cursor over n rows at most with keys of [from, to) that have
// not expired, to be closed by the caller.
func (s *shard) list(from, to string, now int64, n int) (*cursor, error) {
	rows, err := s.page.Query(from, to, now, n)
	if err != nil {
		return nil, s.note(err)
	}
	return &cursor{shard: s, rows: rows}, nil
}

// next goes to the next row.
func (c *cursor) next() (err error) {
	if !c.rows.Next() {
		c.key = ended
		return c.shard.note(c.rows.Err())
	}
	c.blob, err = scanBlob(c.rows, &c.key, nil)
	return c.shard.note(err)
}

func (c *cursor) row() listed {
	b := c.blob
	etag, _ := b.etags()
	l := listed{c.key, b.size, b.contentType, etag, stamp(b.created), stamp(b.updated), b.version, ""}
	if b.expires != 0 {
		l.Expires = stamp(b.expires)
	}
	return l
}

func (s *shard) newID() int64 { return s.nextID.Add(1) }

// hold keeps the content id from being swept until release.
func (s *shard) hold(id int64) {
	s.heldMu.Lock()
	s.held[id]++
	s.heldMu.Unlock()
}

func (s *shard) release(id int64) {
	s.heldMu.Lock()
	if s.held[id]--; s.held[id] == 0 {
		delete(s.held, id)
	}
	s.heldMu.Unlock()
	s.upkeepDue.Store(true)
}

// putOptions is what a put asks for beside key and body.
type putOptions struct {
	contentType string
	length      int64                  // of the body as announced, -1 when unknown
	ttl         time.Duration          // 0: for ever
	conditions  *conditions            // nil: none
	copyOf      *blob                  // whose times and version it gets; nil: it is new
	verify      func(sum []byte) error // decides on the SHA-256 of the body, once that is read; nil: any will do
}

// put stores body under key and returns what it stored, and whether that is
// only queued. An error means that nothing a reader can see has changed.
func (s *shard) put(key string, body io.Reader, p *putOptions) (_ *blob, queued bool, err error) {
	hash := sha256.New()
	body = io.TeeReader(body, hash)
	b := &blob{contentType: p.contentType}
	if s.store.deflate {
		b.codec = deflated // if it pays: see pack
	}
	buf, err := readChunk(body, nil, p.length)
	if err != nil {
		return nil, false, err
	}
	if len(buf) > chunkSize {
		if buf, err = s.upload(body, buf, b); err != nil {
			return nil, false, err
		}
	}
	b.data = b.pack(buf)
	hash.Sum(b.sum[:0])
	if p.verify != nil {
		if err := p.verify(b.sum[:]); err != nil {
			s.unhold(b)
			return nil, false, err
		}
	}
	if p.copyOf != nil {
		b.created, b.updated, b.expires, b.version = p.copyOf.created, p.copyOf.updated, p.copyOf.expires, p.copyOf.version
	}
	if p.ttl != 0 {
		b.expires = s.store.now().Add(p.ttl).UnixMilli()
	}
	queued, err = s.write(&op{apply: (*writer).put, key: key, blob: b, data: b.data, conditions: p.conditions, copied: p.copyOf != nil})
	return b, queued, err
}

// upload streams a body of more than one chunk into the chunks table, all but
// its last chunk, which it returns. buf is what was read already. The content
// id is held until the put that publishes it has been committed or has failed.
//
// While a chunk is being committed the next one is read and packed: a large
// upload runs at the speed of the slower, not of both in turn.
func (s *shard) upload(body io.Reader, buf []byte, b *blob) (last []byte, err error) {
	b.id = s.newID()
	s.hold(b.id)
	data := b.pack(buf[:chunkSize])
	spare := make([]byte, 0, chunkSize+1)
	for seq := int64(0); len(buf) > chunkSize; seq++ {
		o := &op{apply: (*writer).addChunk, blob: &blob{id: b.id}, seq: seq, data: data, urgent: true}
		if err = s.submit(o); err != nil {
			break
		}
		var next []byte
		next, err = readChunk(body, append(spare[:0], buf[chunkSize:]...), -1)
		if len(next) > chunkSize {
			data = b.pack(next[:chunkSize])
		}
		<-o.done
		if err = cmp.Or(err, o.err); err != nil {
			break
		}
		buf, spare = next, buf
	}
	if err != nil {
		s.release(b.id)
	}
	return buf, err
}

// unhold lets go of the content of b that an upload held.
func (s *shard) unhold(b *blob) {
	if b.chunked() {
		s.release(b.id)
	}
}

// remove deletes the blob under key, if there is one and c, nil for none, holds.
func (s *shard) remove(key string, c *conditions) (queued bool, err error) {
	return s.write(&op{apply: (*writer).remove, key: key, conditions: c})
}

// write queues o and waits for its commit, or, in async mode, returns at
// once. Who asked for a precondition waits for its outcome, and a full disk
// turns async mode off: its writers are to be told.
func (s *shard) write(o *op) (queued bool, err error) {
	o.background = s.store.async && o.conditions == nil && !s.store.full.Load()
	if err := s.submit(o); err != nil {
		if o.blob != nil {
			s.unhold(o.blob)
		}
		return false, err
	}
	if o.background {
		return true, nil
	}
	<-o.done
	return false, o.err
}

// submit queues o once there is room for it.
func (s *shard) submit(o *op) error {
	o.cost = s.store.budget.clamp(int64(cap(o.data) + len(o.key) + opOverhead))
	if err := s.store.budget.acquire(o.cost); err != nil {
		return err
	}
	if !s.batcher.add(o) {
		s.store.budget.release(o.cost)
		return errStopping
	}
	return nil
}

// commit is the batcher's: it runs on its goroutine, the only one to use the
// writer. The batch is one transaction. If that fails the whole is rolled back
// and each operation is run again alone, so that a bad one fails alone. Another
// process's lock is waited for, where nobody else waits, as long as it lasts.
func (s *shard) commit(batch []*op) {
	first := batch[0]
	if first.alone != nil {
		s.finish(first, first.alone(s.writer))
		return
	}
	for _, o := range batch {
		s.cache.block(o.key)
	}
	start := time.Now()
	err := translate(s.writer.transact(batch))
	s.store.batches.observe(float64(len(batch)))
	s.store.commits.observe(time.Since(start).Seconds())
	for try := 1; errors.Is(err, errBusy); try++ {
		// Another process has the lock: no operation's fault. Who waits is
		// told; what was answered 202 is tried for as long as we may.
		waits := func(o *op) bool { return !o.background }
		for _, o := range batch {
			if waits(o) {
				s.finish(o, err)
			}
		}
		if batch = slices.DeleteFunc(batch, waits); len(batch) == 0 || try > 1 && s.store.stopping() {
			break
		}
		err = translate(s.writer.transact(batch))
	}
	if err != nil && len(batch) > 1 && !errors.Is(err, errBusy) {
		for i := range batch {
			s.commit(batch[i : i+1])
		}
		return
	}
	if errors.Is(err, errFull) && len(batch) == 1 && batch[0].data == nil { // a delete: it frees more than it takes
		err = s.makeRoom(func() error { return translate(s.writer.transact(batch)) })
	}
	for _, o := range batch {
		s.finish(o, err)
	}
}

// finish settles one operation: what readers and the writer's client see next
// is its outcome.
func (s *shard) finish(o *op, err error) {
	o.err = cmp.Or(s.note(err), o.refused)
	s.cache.drop(o.key) // after COMMIT and before anybody is told
	if o.blob != nil && o.key != "" {
		s.unhold(o.blob) // published or not, it is not ours any more
	}
	switch {
	case o.alone != nil: // upkeep's affair
	case err == nil && o.refused != nil: // nothing changed
	case errors.Is(err, errFull):
		s.store.full.Store(true)
		s.wakeUpkeep()
	case err != nil:
		s.failure.Store(&err)
	default:
		s.failure.Store(nil)
		s.upkeepDue.Store(true) // it may have freed pages
		s.writes.Add(1)
		if o.data != nil {
			s.store.full.Store(false)
		}
	}
	if err != nil && o.background {
		s.failedWrites.Add(1)
		s.store.log.Error("a write that was answered 202 failed", "key", o.key, "shard", s.index, "error", err)
	}
	s.store.budget.release(o.cost)
	s.batcher.finish(o)
}

// readChunk appends to buf from r up to one byte more than a chunk, which tells
// whether another follows, or to the end. length is a hint, -1 for none. Memory
// follows what has arrived, not what was announced: a client that sends nothing
// holds next to nothing.
func readChunk(r io.Reader, buf []byte, length int64) ([]byte, error) {
	if length < 0 || length > chunkSize {
		length = chunkSize
	}
	for len(buf) <= chunkSize {
		if len(buf) == cap(buf) {
			size := max(smallBody, 4*int64(len(buf)))
			if int64(len(buf)) <= length {
				size = min(size, length+1)
			}
			buf = append(make([]byte, 0, min(size, chunkSize+1)), buf...)
		}
		n, err := r.Read(buf[len(buf):cap(buf)])
		buf = buf[:len(buf)+n]
		if err == io.EOF {
			return buf, nil
		}
		if err != nil {
			return nil, err
		}
	}
	return buf, nil
}

// ============================================================================
// Batcher
//
// Writes of a shard queue up and are committed in groups by one goroutine: the
// group is what is queued already, up to size operations, so that writers
// share the cost of a commit and its sync without waiting for one another. A
// window adds a wait for more, counted from the group's first operation.
//
// Invariants: operations are committed in the order of add; done is closed
// exactly once for each, after its commit; of the background operations on one
// key newest is the last. So who waits for newest has waited for all of them,
// which is how a read after a 202 sees the write: it needs no second copy of
// the data, no merged view, no version arithmetic. Tried and rejected: a map
// of pending contents that reads consult, which has to know the row beneath.
//
// The budget bounds the bytes queued over all shards.
// ============================================================================

// op is one write and its outcome, or a piece of upkeep.
type op struct {
	apply func(*writer, *op) error // inside the transaction of a batch, or
	alone func(*writer) error      // outside any, by itself
	key   string                   // empty for a chunk
	blob  *blob
	seq   int64  // of the chunk
	data  []byte // content this operation writes; nil when it deletes

	conditions *conditions // of a put or delete; nil: none
	copied     bool        // blob keeps its times and version
	refused    error       // set by apply, which then changed nothing

	background bool // nobody waits
	urgent     bool // its batch does not wait for more
	cost       int64
	queued     time.Time
	done       chan struct{} // closed by the batcher
	err        error         // valid once done is closed
}

type batcher struct {
	size   int
	commit func([]*op) // calls finish for each
	wake   chan struct{}
	ended  chan struct{} // closed by run

	mu     sync.Mutex // guards the rest
	window time.Duration
	queue  []*op
	newest map[string]*op // background operations not yet committed
	hurry  bool           // somebody waits for the queue: no window
	closed bool
}

func newBatcher(size int, window time.Duration, commit func([]*op)) *batcher {
	return &batcher{size: size, window: window, commit: commit, wake: make(chan struct{}, 1),
		ended: make(chan struct{}), newest: map[string]*op{}}
}

// add queues o; false once the batcher is closed.
func (b *batcher) add(o *op) bool {
	o.done = make(chan struct{})
	o.queued = time.Now()
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return false
	}
	b.queue = append(b.queue, o)
	b.hurry = b.hurry || o.urgent
	if o.background {
		b.newest[o.key], b.newest[everything] = o, o
	}
	b.signal()
	return true
}

func (b *batcher) signal() {
	select {
	case b.wake <- struct{}{}:
	default: // the batcher has a signal to come
	}
}

// everything stands for all keys, none of which is empty.
const everything = ""

// settle returns once every background operation on key that was queued
// before the call is committed or has failed.
func (b *batcher) settle(key string) {
	b.mu.Lock()
	o := b.newest[key]
	if o != nil && len(b.queue) > 0 {
		b.hurry = true
		b.signal()
	}
	b.mu.Unlock()
	if o != nil {
		<-o.done
	}
}

// finish is called by commit for each operation of the batch.
func (b *batcher) finish(o *op) {
	if o.background {
		b.mu.Lock()
		for _, key := range []string{o.key, everything} {
			if b.newest[key] == o {
				delete(b.newest, key)
			}
		}
		b.mu.Unlock()
	}
	close(o.done)
}

// depth returns how many operations are queued.
func (b *batcher) depth() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return len(b.queue)
}

// endWindow makes this and all later batches wait for nothing.
func (b *batcher) endWindow() {
	b.mu.Lock()
	b.window = 0
	b.signal()
	b.mu.Unlock()
}

// close commits what is queued and ends run.
func (b *batcher) close() {
	b.mu.Lock()
	b.closed = true
	b.signal()
	b.mu.Unlock()
	<-b.ended
}

// run commits batches until close; it is the batcher's goroutine.
func (b *batcher) run() {
	defer close(b.ended)
	for {
		// Whoever woke us is often followed by others that are ready to add:
		// let them, else batches are of one when cores are few. Measured: 1.6
		// times the writes.
		runtime.Gosched()
		batch, wait := b.take(time.Now())
		switch {
		case batch != nil:
			b.commit(batch)
			clear(batch) // the queue's array must not keep contents alive
		case wait < 0:
			return
		default:
			var timeout <-chan time.Time // nil: none
			if wait > 0 {
				timeout = time.After(wait)
			}
			select {
			case <-b.wake:
			case <-timeout:
			}
		}
	}
}

// take returns the next batch, or nil and how long to wait for more: 0 until
// woken, negative for ever.
func (b *batcher) take(now time.Time) (batch []*op, wait time.Duration) {
	b.mu.Lock()
	defer b.mu.Unlock()
	n, bytes := 0, 0
	for n < len(b.queue) && n < b.size && bytes < batchBytes && b.queue[n].alone == nil {
		bytes += len(b.queue[n].data) + opOverhead
		n++
	}
	switch {
	case len(b.queue) == 0 && b.closed:
		return nil, -1
	case len(b.queue) == 0:
		return nil, 0
	case n == 0:
		n = 1 // alone
	case n == len(b.queue) && n < b.size && bytes < batchBytes && !b.hurry && !b.closed:
		if wait := b.window - now.Sub(b.queue[0].queued); wait > 0 {
			return nil, wait
		}
	}
	batch, b.queue = b.queue[:n:n], b.queue[n:]
	if len(b.queue) == 0 {
		b.hurry = false
	}
	return batch, 0
}

// budget is a fair semaphore over bytes. Who finds no room waits in line, at
// most patience.
type budget struct {
	size     int64
	patience time.Duration
	stop     <-chan struct{} // closed when nobody is to wait any more
	turn     chan struct{}   // capacity 1: who has put something in may take; the line forms here
	freed    chan struct{}   // capacity 1: bytes came back since who has the turn looked
	free     atomic.Int64    // less by who has the turn, more by anybody
}

func newBudget(size int64, patience time.Duration, stop <-chan struct{}) *budget {
	b := &budget{size: size, patience: patience, stop: stop, turn: make(chan struct{}, 1), freed: make(chan struct{}, 1)}
	b.free.Store(size)
	return b
}

// clamp makes one operation, however large, fit into the whole budget.
func (b *budget) clamp(n int64) int64 { return min(n, b.size) }

// acquire takes n bytes, errBusy when there is no room for too long and
// errStopping when the store is closing.
func (b *budget) acquire(n int64) error {
	timeout := time.NewTimer(b.patience)
	defer timeout.Stop()
	wait := func(take chan<- struct{}, come <-chan struct{}) error {
		select {
		case take <- struct{}{}:
		case <-come:
		case <-timeout.C:
			return errBusy
		case <-b.stop:
			return errStopping
		}
		return nil
	}
	if err := wait(b.turn, nil); err != nil {
		return err
	}
	defer func() { <-b.turn }()
	for b.free.Load() < n {
		if err := wait(nil, b.freed); err != nil {
			return err
		}
	}
	b.free.Add(-n)
	return nil
}

func (b *budget) release(n int64) {
	b.free.Add(n)
	select {
	case b.freed <- struct{}{}:
	default: // said already
	}
}

// ============================================================================
// Writer
//
// The SQL of writes, on one connection with everything prepared: BEGIN and
// COMMIT too, as database/sql's transactions prepare each statement again.
// Only the batcher's goroutine calls it, once the shard is open. No request's
// context comes here: a cancelled one would discard the connection.
// ============================================================================

type writer struct {
	db    *sql.DB // of one connection
	newID func() int64
	now   func() time.Time
	room  func() error // whether writes other than deletes may use the disk

	prepared map[string]*sql.Stmt // by text, each when first used
}

// stmt returns query prepared.
func (w *writer) stmt(query string) (*sql.Stmt, error) {
	if s := w.prepared[query]; s != nil {
		return s, nil
	}
	s, err := w.db.Prepare(query)
	if err == nil {
		w.prepared[query] = s
	}
	return s, err
}

// exec runs query and returns how many rows it changed.
func (w *writer) exec(query string, args ...any) (int64, error) {
	s, err := w.stmt(query)
	if err != nil {
		return 0, err
	}
	r, err := s.Exec(args...)
	if err != nil {
		return 0, err
	}
	return r.RowsAffected()
}

const (
	findQuery = `SELECT id, size, sha256, created_at, updated_at, coalesce(expires_at, 0), version FROM blobs WHERE key = ?`

	// Over a row that has chunks, or where the old content or the new one
	// expires, it does nothing: so it leaves that index alone.
	upsertQuery = `INSERT INTO blobs (id, key, size, sha256, codec, stored, crc32, content_type, created_at, updated_at, expires_at, version, data)
		VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (key) DO UPDATE SET size = excluded.size, sha256 = excluded.sha256,
		codec = excluded.codec, stored = excluded.stored, crc32 = excluded.crc32, content_type = excluded.content_type, updated_at = excluded.updated_at,
		version = version + 1, data = excluded.data WHERE size <= ? AND expires_at IS NULL AND excluded.expires_at IS NULL`

	orphanQuery   = `INSERT INTO orphans (id) VALUES (?)`
	unorphanQuery = `DELETE FROM orphans WHERE id = ?`

	expireQuery = `DELETE FROM blobs WHERE id = (SELECT id FROM blobs WHERE expires_at <= ? ORDER BY expires_at LIMIT 1) RETURNING id, size`
	sweepQuery  = `DELETE FROM chunks WHERE id IN (SELECT id FROM chunks WHERE id >= ?1 << 20 AND id < (?1 + 1) << 20 LIMIT ?2)`
)

func openWriter(path, durability string) (_ *writer, err error) {
	w := &writer{prepared: map[string]*sql.Stmt{}, db: openDB(path, fmt.Sprintf("mode=rw&_pragma=busy_timeout(%d)&_pragma=synchronous(%s)&_pragma=temp_store(memory)&_pragma=journal_size_limit(%d)",
		busyTimeout.Milliseconds(), durability, reserveBytes))}
	w.db.SetMaxOpenConns(1)
	defer func() {
		if err != nil {
			w.db.Close()
		}
	}()
	var v int64
	if err := w.db.QueryRow("PRAGMA user_version").Scan(&v); err != nil {
		return nil, err
	}
	if v > schemaVersion {
		return nil, newerSchema(v)
	}
	return w, nil
}

func newerSchema(v int64) error {
	return fmt.Errorf("its schema is version %d, this program knows %d; use a newer server", v, schemaVersion)
}

// truncateWAL copies the WAL into the database and empties it, unless a reader
// keeps it from that.
func (w *writer) truncateWAL() error {
	_, err := w.db.Exec("PRAGMA wal_checkpoint(TRUNCATE)")
	return err
}

// recordOf reads what a shard knows of its directory.
func recordOf(db *sql.DB) (*record, error) {
	r := &record{}
	err := db.QueryRow(`SELECT n.value, s.value, h.value, d.value FROM meta n, meta s, meta h, meta d
		WHERE n.key = 'num_shards' AND s.key = 'shard' AND h.key = 'hash' AND d.key = 'directory'`).
		Scan(&r.NumShards, &r.Shard, &r.Hash, &r.Directory)
	if errors.Is(err, sql.ErrNoRows) {
		err = fmt.Errorf("%w: meta is incomplete", errCorrupt)
	}
	return r, err
}

// lastID is the highest content id ever used that still matters: chunks have
// no ids beside those of blobs and orphans.
func (w *writer) lastID() (id int64, err error) {
	err = w.db.QueryRow("SELECT max((SELECT coalesce(max(id), 0) FROM blobs), (SELECT coalesce(max(id), 0) FROM orphans))").Scan(&id)
	return id, err
}

// transact applies batch in one transaction: all of it is committed, or
// nothing of it and the error says why.
func (w *writer) transact(batch []*op) error {
	return w.inTransaction(func() error {
		for _, o := range batch {
			if err := o.apply(w, o); err != nil {
				return err
			}
		}
		return nil
	})
}

func (w *writer) inTransaction(f func() error) error {
	_, err := w.exec("BEGIN IMMEDIATE")
	if err != nil {
		return err
	}
	if err = f(); err == nil {
		_, err = w.exec("COMMIT")
	}
	if err != nil {
		w.exec("ROLLBACK") // fails when SQLite has rolled back already
	}
	return err
}

// put stores o.blob under o.key; when chunked, all chunks but the last are in
// place. The content that was there goes with the same transaction.
func (w *writer) put(o *op) error {
	if err := w.room(); err != nil {
		return err
	}
	b, now := o.blob, w.now().UnixMilli()
	created, updated, version := now, now, int64(0)
	if o.copied {
		created, updated, version = b.created, b.updated, b.version
	}
	if !b.chunked() && o.conditions == nil {
		// Nearly always one statement does it: nothing there, or a small
		// content to be replaced in place. Measured: 0.9 of the time of
		// looking first.
		done, err := w.insert(w.newID(), o.key, b, created, updated, version, b.data)
		if done || err != nil {
			return err
		}
	}
	old, err := w.admit(o, now)
	if err != nil || o.refused != nil {
		return err
	}
	if old != nil {
		if !old.expired(now) {
			created, version = old.created, old.version+1
		}
		if err := w.forget(old); err != nil {
			return err
		}
	}
	if !b.chunked() {
		_, err := w.insert(w.newID(), o.key, b, created, updated, version, b.data)
		return err
	}
	if err := w.insertChunk(b.id, b.lastSeq(), b.data); err != nil {
		return err
	}
	if _, err := w.exec(unorphanQuery, b.id); err != nil {
		return err
	}
	_, err = w.insert(b.id, o.key, b, created, updated, version, nil)
	return err
}

// insert makes the row of key, or, over a row without chunks where nothing
// expires, replaces its content and counts the version. It does nothing over any
// other row and returns false.
func (w *writer) insert(id int64, key string, b *blob, created, updated, version int64, data any) (bool, error) {
	var crc, expires any // NULL
	if b.codec == deflated {
		crc = int64(b.crc)
	}
	if b.expires != 0 {
		expires = b.expires
	}
	n, err := w.exec(upsertQuery, id, key, b.size, b.sum[:], int64(b.codec), b.stored, crc, b.contentType, created, updated, expires, version, data, chunkSize)
	return n == 1, err
}

// admit returns what is known of the row of o.key, nil when there is none, and
// decides o's preconditions: here, where the batch's earlier operations are
// seen and no other writer is.
func (w *writer) admit(o *op, now int64) (*blob, error) {
	old, live := &blob{}, (*blob)(nil)
	var sum []byte
	find, err := w.stmt(findQuery)
	if err != nil {
		return nil, err
	}
	err = find.QueryRow(o.key).Scan(&old.id, &old.size, &sum, &old.created, &old.updated, &old.expires, &old.version)
	switch {
	case errors.Is(err, sql.ErrNoRows):
		old = nil
	case err != nil:
		return nil, err
	default:
		if copy(old.sum[:], sum); !old.expired(now) {
			live = old
		}
	}
	o.refused = o.conditions.refuseWrite(live)
	return old, nil
}

// addChunk adds one chunk to a content that is not published yet.
func (w *writer) addChunk(o *op) error {
	if err := w.room(); err != nil {
		return err
	}
	if o.seq == 0 { // with the first chunk, else a crash leaves chunks nobody finds
		if _, err := w.exec(orphanQuery, o.blob.id); err != nil {
			return err
		}
	}
	return w.insertChunk(o.blob.id, o.seq, o.data)
}

func (w *writer) insertChunk(id, seq int64, data []byte) error {
	_, err := w.exec("INSERT INTO chunks (id, data) VALUES (?, ?)", id<<seqBits|seq, data)
	return err
}

// remove deletes the row of o.key, if there is one.
func (w *writer) remove(o *op) error {
	old, err := w.admit(o, w.now().UnixMilli())
	if old == nil || o.refused != nil || err != nil {
		return err
	}
	return w.forget(old)
}

// forget deletes a row and hands its chunks, if any, to the sweep.
func (w *writer) forget(old *blob) error {
	if _, err := w.exec("DELETE FROM blobs WHERE id = ?", old.id); err != nil || !old.chunked() {
		return err
	}
	_, err := w.exec(orphanQuery, old.id)
	return err
}

// steps takes steps in one transaction for a slice's time, until there are no
// more; one at least, however long BEGIN has waited for somebody's lock.
func (w *writer) steps(step func() (more bool, err error)) error {
	start := time.Now()
	return w.inTransaction(func() error {
		for {
			if more, err := step(); !more || err != nil || time.Since(start) >= sliceTime {
				return err
			}
		}
	})
}

// expire deletes blobs whose time has come.
func (w *writer) expire() error {
	now := w.now().UnixMilli()
	return w.steps(func() (more bool, err error) {
		old := &blob{}
		expire, err := w.stmt(expireQuery)
		if err == nil {
			err = expire.QueryRow(now).Scan(&old.id, &old.size)
		}
		if errors.Is(err, sql.ErrNoRows) {
			return false, nil
		}
		if err == nil && old.chunked() {
			_, err = w.exec(orphanQuery, old.id)
		}
		return true, err
	})
}

// sweep deletes chunks of the orphans that victim returns, and an orphan with
// its last chunk. victim returns 0 for none.
func (w *writer) sweep(victim func() (int64, error)) (swept bool, err error) {
	err = w.steps(func() (more bool, err error) {
		id, err := victim()
		if id == 0 || err != nil {
			return false, err
		}
		swept = true
		n, err := w.exec(sweepQuery, id, sweepChunks)
		if err == nil && n < sweepChunks {
			_, err = w.exec(unorphanQuery, id)
		}
		return true, err
	})
	return swept, err
}

// ============================================================================
// Codec
//
// A content lies as it is or deflated, chunk by chunk: each chunk with a
// dictionary of its own and ended by a sync flush, so that it can be inflated
// alone, and the chunks in a row, with a header before them and an empty block,
// checksum and size behind, are one gzip member. Whoever wants gzip is sent them
// as they lie.
//
// These functions run on request goroutines and hold a deflater, nearly 1 MiB of
// it, for one chunk and never while a client is waited for.
// ============================================================================

// deflater is a writer and the buffer it fills.
type deflater struct {
	*flate.Writer
	out bytes.Buffer
}

var (
	deflaters = sync.Pool{New: func() any {
		w, err := flate.NewWriter(nil, deflateLevel)
		if err != nil {
			panic(err) // only a level that does not exist
		}
		return &deflater{Writer: w}
	}}
	inflaters = sync.Pool{New: func() any { return flate.NewReader(nil) }}
)

// deflate returns chunk deflated, a few bytes longer where it does not shrink.
func deflate(chunk []byte) []byte {
	d := deflaters.Get().(*deflater)
	defer deflaters.Put(d)
	d.out.Reset()
	d.Reset(&d.out)
	d.Write(chunk) // a buffer takes everything
	d.Flush()
	return bytes.Clone(d.out.Bytes())
}

// inflate appends to dst the size bytes that were deflated to data.
func inflate(dst, data []byte, size int64) ([]byte, error) {
	r := inflaters.Get().(io.Reader)
	defer inflaters.Put(r)
	r.(flate.Resetter).Reset(bytes.NewReader(data), nil) // never fails
	out := slices.Grow(dst, int(size))[:len(dst)+int(size)]
	if _, err := io.ReadFull(r, out[len(dst):]); err != nil {
		return dst, fmt.Errorf("%w: cannot inflate: %w", errCorrupt, err)
	}
	if n, _ := r.Read(make([]byte, 1)); n != 0 {
		return dst, fmt.Errorf("%w: more than %d bytes were deflated", errCorrupt, size)
	}
	return out, nil
}

// compressible guesses from some bytes of a chunk whether deflating it pays:
// whether bytes repeat twice as often as they would at random, which in text
// they do ten times. It takes 3 µs where trying takes 50; what repeats only in
// long stretches is missed.
func compressible(chunk []byte) bool {
	if len(chunk) < minDeflate {
		return false
	}
	stride := len(chunk)/sampleBytes | 1 // odd, not to meet one column of a table alone
	var counts [256]int64
	for i := 0; i < len(chunk); i += stride {
		counts[chunk[i]]++
	}
	var n, pairs int64
	for _, c := range counts {
		n += c
		pairs += c * (c - 1)
	}
	return pairs*int64(len(counts)) > 2*n*(n-1)
}

// pack returns the next chunk of b as it will lie in the shard, and counts it.
// The first chunk decides for all of them whether the blob is deflated.
func (b *blob) pack(chunk []byte) []byte {
	data, first := chunk, b.size == 0
	if b.codec == deflated && first && !compressible(chunk) {
		b.codec = identity
	}
	if b.codec == deflated {
		data = deflate(chunk)
		b.crc = crc32.Update(b.crc, crc32.IEEETable, chunk)
		if first && len(data) > len(chunk)-len(chunk)/8 {
			b.codec, b.crc, data = identity, 0, chunk
		}
	}
	b.size += int64(len(chunk))
	b.stored += int64(len(data))
	return data
}

// What makes a gzip member of deflated chunks: a header without name and time,
// an empty last block, and eight bytes of checksum and size.
const (
	gzipHeader   = "\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\xff"
	gzipEnd      = "\x03\x00"
	gzipOverhead = int64(len(gzipHeader) + len(gzipEnd) + 8)
)

// ============================================================================
// Cache, content
//
// What readers hold on to. The cache keeps small committed contents in memory;
// a content is one download's position in a blob.
// ============================================================================

// cache maps keys to committed small blobs, at most limit bytes of them. It
// is right because the shard has one writer, which blocks the keys of a batch
// before its transaction and drops them after the COMMIT, before anybody is
// told; and because a reader reserves the key's place before it reads the row
// and fills that very place or none: block and drop take it away. So while a
// transaction may change a key, its readers see the database, and what they
// saw before it is not kept. Victims are random: there is nothing to maintain
// on a hit, and a scan over more than fits does not empty it.
type cache struct {
	limit int

	mu      sync.Mutex // guards the rest
	bytes   int
	entries map[string]*blob // one of negative size is a reserved place
}

func newCache(limit int) *cache {
	return &cache{limit: limit, entries: map[string]*blob{}}
}

// get returns the committed blob under key if it is at hand, else nil.
func (c *cache) get(key string) *blob {
	c.mu.Lock()
	defer c.mu.Unlock()
	if b := c.entries[key]; b != nil && b.size >= 0 {
		return b
	}
	return nil
}

// reserve returns a place for key, nil when another reader has it.
func (c *cache) reserve(key string) *blob {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.entries[key] != nil {
		return nil
	}
	place := &blob{size: -1}
	c.entries[key] = place
	return place
}

// fill puts b, or nothing if that is nil or large, where place still is.
func (c *cache) fill(key string, place, b *blob) {
	if place == nil {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.entries[key] != place {
		return
	}
	delete(c.entries, key)
	if b == nil || b.chunked() || len(b.data) > cacheItem || entryBytes(key, b) > c.limit {
		return
	}
	for victim, v := range c.entries {
		if c.bytes+entryBytes(key, b) <= c.limit {
			break
		}
		if v.size >= 0 {
			c.remove(victim)
		}
	}
	c.bytes += entryBytes(key, b)
	c.entries[key] = b
}

// blocked is a place that no reader can fill.
var blocked = &blob{size: -1}

// block forgets key, and keeps readers from saying anything of it until drop.
func (c *cache) block(key string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.remove(key)
	c.entries[key] = blocked
}

// drop forgets key and what readers are about to say of it.
func (c *cache) drop(key string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.remove(key)
}

// remove deletes an entry of any sort. c.mu is held.
func (c *cache) remove(key string) {
	if b := c.entries[key]; b != nil && b.size >= 0 {
		c.bytes -= entryBytes(key, b)
	}
	delete(c.entries, key)
}

// entryBytes is about what an entry holds: blob, header values
// and the map's share come to about 500 bytes beside key and content.
func entryBytes(key string, b *blob) int {
	return len(key) + len(b.data) + len(b.contentType) + 500
}

// content is an io.ReaderAt over a blob, for one request. Of a chunked blob
// it has one chunk in memory and takes the next by a query of its own, so that
// a slow client holds neither connection nor transaction. The content of a
// HEAD has no data and is not to be read.
type content struct {
	shard    *shard
	blob     *blob
	headOnly bool   // the blob's data stayed on the disk
	held     bool   // the blob's id is
	zipped   bool   // to be sent as one gzip member
	chunk    []byte // chunk number seq, when not empty; of a gzip member the piece
	seq      int64
	crc      uint32 // of the chunks so far, for the member's end

	// For several ranges http.ServeContent reads in a goroutine of its own,
	// which may outlive it when the client goes away.
	mu     sync.Mutex // held by ReadAt and close
	closed bool
	err    error // the last of ReadAt: ServeContent keeps it to itself
}

// close lets go of the content and returns what ReadAt failed with. It may be
// called twice.
func (c *content) close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.held && !c.closed {
		c.shard.release(c.blob.id)
	}
	c.closed = true
	return c.err
}

func (c *content) ReadAt(p []byte, offset int64) (n int, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return 0, fs.ErrClosed
	}
	for ; n < len(p) && offset < c.blob.size; offset = offset - offset%chunkSize + chunkSize {
		if c.err = c.load(offset / chunkSize); c.err != nil {
			return n, c.err
		}
		n += copy(p[n:], c.chunk[offset%chunkSize:])
	}
	if n < len(p) {
		err = io.EOF
	}
	return n, err
}

// reader returns a reader of all of the content.
func (c *content) reader() *io.SectionReader { return io.NewSectionReader(c, 0, c.blob.size) }

// load brings chunk seq into memory. A chunk that is missing or of the wrong
// length is an error: a download is whole or visibly cut.
func (c *content) load(seq int64) error {
	if c.seq == seq && len(c.chunk) > 0 {
		return nil
	}
	if !c.blob.chunked() && c.blob.codec == identity {
		c.chunk = c.blob.data // others', and not to be written to
		return nil
	}
	want := min(chunkSize, c.blob.size-seq*chunkSize)
	return c.fetch(seq, func(data []byte) (err error) {
		if c.chunk = c.chunk[:0]; c.blob.codec == identity {
			c.chunk = append(c.chunk, data...)
		} else if c.chunk, err = inflate(c.chunk, data, want); err != nil {
			return err
		}
		if int64(len(c.chunk)) != want {
			return fmt.Errorf("%w: chunk %d of content %d has %d bytes, not %d", errCorrupt, seq, c.blob.id, len(c.chunk), want)
		}
		c.seq = seq
		return nil
	})
}

// piece returns what chunk seq, the next one, contributes to the answer. It is
// valid until the next call.
func (c *content) piece(seq int64) ([]byte, error) {
	if !c.zipped {
		err := c.load(seq)
		return c.chunk, err
	}
	b := c.blob
	if c.chunk = c.chunk[:0]; seq == 0 {
		c.chunk, c.crc = append(c.chunk, gzipHeader...), b.crc
	}
	err := c.fetch(seq, func(data []byte) error {
		if b.codec == identity {
			c.crc = crc32.Update(c.crc, crc32.IEEETable, data)
			data = deflate(data)
		}
		c.chunk = append(c.chunk, data...)
		return nil
	})
	if seq == b.lastSeq() {
		c.chunk = append(c.chunk, gzipEnd...)
		c.chunk = binary.LittleEndian.AppendUint32(c.chunk, c.crc)
		c.chunk = binary.LittleEndian.AppendUint32(c.chunk, uint32(b.size))
	}
	return c.chunk, err
}

// fetch calls use with chunk seq as it lies, which is valid during the call.
func (c *content) fetch(seq int64, use func(data []byte) error) (err error) {
	defer func() { err = c.shard.note(err) }()
	if !c.blob.chunked() {
		return use(c.blob.data)
	}
	rows, err := c.shard.chunk.Query(c.blob.id<<seqBits | seq)
	if err != nil {
		return err
	}
	defer rows.Close()
	if !rows.Next() {
		return cmp.Or(rows.Err(), fmt.Errorf("%w: chunk %d of content %d is missing", errCorrupt, seq, c.blob.id))
	}
	var data sql.RawBytes
	if err := rows.Scan(&data); err != nil {
		return err
	}
	return use(data)
}

// ============================================================================
// Metrics
//
// What the server does, in the text format of Prometheus. Labels are bounded:
// route patterns, known methods, status codes, shards. A scrape looks at one row
// and two files a shard, however many blobs there are.
// ============================================================================

// durations are the upper bounds of seconds, from a cached GET to the drain.
var durations = []float64{.0001, .00025, .0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 15}

// histogram counts observations up to each of its bounds. Any goroutine may
// use it.
type histogram struct {
	bounds []float64
	mu     sync.Mutex // guards the rest
	counts []int64    // up to each bound and not the one before; the last: above
	sum    float64
}

func newHistogram(bounds ...float64) *histogram {
	return &histogram{bounds: bounds, counts: make([]int64, len(bounds)+1)}
}

func (h *histogram) observe(v float64) {
	i, _ := slices.BinarySearch(h.bounds, v)
	h.mu.Lock()
	h.counts[i]++
	h.sum += v
	h.mu.Unlock()
}

// metrics are the counts of requests. Any goroutine may use them.
type metrics struct {
	mu             sync.Mutex // guards the rest
	requests       map[requestKind]int64
	seconds        map[string]*histogram // by route
	received, sent int64
}

type requestKind struct {
	route, method string
	code          int // 0: cut off
}

func newMetrics() *metrics {
	return &metrics{requests: map[requestKind]int64{}, seconds: map[string]*histogram{}}
}

// observe counts one request.
func (m *metrics) observe(w *response, r *http.Request, took time.Duration) {
	_, route, _ := strings.Cut(r.Pattern, " ")
	k := requestKind{cmp.Or(route, r.Pattern, "none"), r.Method, w.status}
	if !slices.Contains([]string{"GET", "HEAD", "PUT", "POST", "DELETE", "OPTIONS"}, k.method) {
		k.method = "other"
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.requests[k]++
	m.received += w.received
	m.sent += w.sent
	h := m.seconds[k.route]
	if h == nil {
		h = newHistogram(durations...)
		m.seconds[k.route] = h
	}
	h.observe(took.Seconds())
}

// exposition is a text for Prometheus in the making.
type exposition struct{ bytes.Buffer }

// metric begins a metric; its samples follow.
func (e *exposition) metric(name, kind, help string) {
	fmt.Fprintf(e, "# HELP %s %s\n# TYPE %[1]s %[3]s\n", name, help, kind)
}

// sample adds a sample; labels are name, value pairs.
func (e *exposition) sample(name string, v float64, labels ...string) {
	e.WriteString(name)
	for i := 0; i < len(labels); i += 2 {
		fmt.Fprintf(e, "%c%s=%q", "{,"[min(i, 1)], labels[i], labels[i+1])
	}
	if len(labels) > 0 {
		e.WriteByte('}')
	}
	fmt.Fprintf(e, " %s\n", strconv.FormatFloat(v, 'g', -1, 64))
}

func (e *exposition) histogram(name string, h *histogram, labels ...string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	var n int64
	for i, count := range h.counts {
		n += count
		le := "+Inf"
		if i < len(h.bounds) {
			le = strconv.FormatFloat(h.bounds[i], 'g', -1, 64)
		}
		e.sample(name+"_bucket", float64(n), append(slices.Clip(labels), "le", le)...)
	}
	e.sample(name+"_sum", h.sum, labels...)
	e.sample(name+"_count", float64(n), labels...)
}

// exposeMetrics serves /metrics.
func (s *server) exposeMetrics(w *response, _ *http.Request) error {
	e := &exposition{}
	s.metrics.expose(e)
	s.store.expose(e)
	var mem runtime.MemStats
	runtime.ReadMemStats(&mem)
	for _, g := range []struct {
		name, kind, help string
		value            float64
	}{
		{"go_goroutines", "gauge", "Goroutines that exist.", float64(runtime.NumGoroutine())},
		{"go_memstats_heap_alloc_bytes", "gauge", "Bytes of heap objects.", float64(mem.HeapAlloc)},
		{"go_memstats_sys_bytes", "gauge", "Bytes obtained from the system.", float64(mem.Sys)},
		{"go_memstats_alloc_bytes_total", "counter", "Bytes allocated since the start.", float64(mem.TotalAlloc)},
		{"go_gc_cycles_total", "counter", "Garbage collections since the start.", float64(mem.NumGC)},
	} {
		e.metric(g.name, g.kind, g.help)
		e.sample(g.name, g.value)
	}
	e.metric("blobnom_build_info", "gauge", "What runs.")
	e.sample("blobnom_build_info", 1, "version", version, "goversion", runtime.Version())
	w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
	w.Header()["X-Content-Type-Options"] = noSniff
	_, err := w.Write(e.Bytes())
	return err
}

func (m *metrics) expose(e *exposition) {
	m.mu.Lock()
	defer m.mu.Unlock()
	e.metric("blobnom_http_requests_total", "counter", "Requests by route, method and status code; 0 was cut off.")
	for k, n := range m.requests {
		e.sample("blobnom_http_requests_total", float64(n), "route", k.route, "method", k.method, "code", strconv.Itoa(k.code))
	}
	e.metric("blobnom_http_request_duration_seconds", "histogram", "Time from the request's header to the end of its answer.")
	for route, h := range m.seconds {
		e.histogram("blobnom_http_request_duration_seconds", h, "route", route)
	}
	e.metric("blobnom_http_received_bytes_total", "counter", "Bytes of uploaded bodies.")
	e.sample("blobnom_http_received_bytes_total", float64(m.received))
	e.metric("blobnom_http_sent_bytes_total", "counter", "Bytes of answered bodies.")
	e.sample("blobnom_http_sent_bytes_total", float64(m.sent))
}

func (st *store) expose(e *exposition) {
	e.metric("blobnom_batch_operations", "histogram", "Operations in a transaction.")
	e.histogram("blobnom_batch_operations", st.batches)
	e.metric("blobnom_commit_duration_seconds", "histogram", "Time a transaction took, with its sync.")
	e.histogram("blobnom_commit_duration_seconds", st.commits)
	e.metric("blobnom_queue_bytes", "gauge", "Bytes of the writes that are queued or being committed.")
	e.sample("blobnom_queue_bytes", float64(st.budget.size-st.budget.free.Load()))
	all := make([]*totals, len(st.shards)) // nil: that shard's row cannot be read
	for i, s := range st.shards {
		t := &totals{}
		if s.broken == nil && s.note(s.totals.QueryRow().Scan(&t.blobs, &t.bytes, &t.orphans)) == nil {
			all[i] = t
		}
	}
	for _, g := range []struct {
		name, kind, help string
		counted          bool // by the shard's row, without which there is no figure
		value            func(s *shard, t *totals) int64
	}{
		{"blobnom_queue_operations", "gauge", "Writes that are queued.", false, func(s *shard, _ *totals) int64 { return int64(s.batcher.depth()) }},
		{"blobnom_failed_background_writes_total", "counter", "Writes that failed after they were answered 202.", false, func(s *shard, _ *totals) int64 { return s.failedWrites.Load() }},
		{"blobnom_shard_blobs", "gauge", "Blobs, with expired ones that are not deleted yet.", true, func(_ *shard, t *totals) int64 { return t.blobs }},
		{"blobnom_shard_content_bytes", "gauge", "Bytes of their contents, as clients see them.", true, func(_ *shard, t *totals) int64 { return t.bytes }},
		{"blobnom_shard_orphans", "gauge", "Contents that are being uploaded or wait to be swept.", true, func(_ *shard, t *totals) int64 { return t.orphans }},
		{"blobnom_shard_file_bytes", "gauge", "Size of the database.", false, func(s *shard, _ *totals) int64 { return s.fileSize("") }},
		{"blobnom_shard_wal_bytes", "gauge", "Size of its write-ahead log.", false, func(s *shard, _ *totals) int64 { return s.fileSize("-wal") }},
	} {
		e.metric(g.name, g.kind, g.help)
		for i, s := range st.shards {
			if s.broken == nil && (all[i] != nil || !g.counted) {
				e.sample(g.name, float64(g.value(s, all[i])), "shard", strconv.Itoa(i))
			}
		}
	}
}

// totals are what a shard's row of that name says.
type totals struct{ blobs, bytes, orphans int64 }

// fileSize returns the size of the shard's database or of a file beside it.
func (s *shard) fileSize(suffix string) int64 {
	return sizeOf(filepath.Join(s.store.dir, shardName(s.index)) + suffix)
}

// ============================================================================
// Upkeep
//
// One goroutine per shard reclaims space: it finds blobs whose time has come
// and contents nobody refers to or reads, deletes a few at a time through the
// batcher, between the writes, and returns free pages to the file system when
// the shard is idle.
//
// It also keeps the reserve, a file that makes a full disk survivable. A
// delete has to write to the WAL, and the WAL gives its space back only once
// all of it is copied into the database, which may have to grow for that. So
// there is a file larger than a shard's WAL. It is lent to a delete that finds
// no room, and to the checkpoint of one shard after the other, each of which
// frees more than it took; and until it is back no other write begins.
// ============================================================================

// wakeUpkeep tells upkeep not to wait for its next tick.
func (s *shard) wakeUpkeep() {
	s.upkeepDue.Store(true)
	select {
	case s.upkeepNow <- struct{}{}:
	default: // said already
	}
}

// pressed reports whether space is short.
func (st *store) pressed() bool { return st.full.Load() || !st.reserved.Load() }

func (s *shard) upkeep() {
	tick := time.NewTicker(sweepInterval)
	defer tick.Stop()
	for {
		expired, _ := s.debris()
		if s.upkeepDue.Swap(false) || expired || s.store.pressed() {
			if err := s.tidy(); err != nil && !errors.Is(err, errStopping) {
				s.upkeepDue.Store(true) // again at the next tick
				s.store.log.Warn("reclaiming space failed, will try again", "shard", s.index, "error", err)
			}
		}
		s.store.takeReserve() // if it is gone; again at the next tick if it cannot be had
		select {
		case <-s.store.stop:
			return
		case <-tick.C:
		case <-s.upkeepNow:
		}
	}
}

// debris reports whether some blob's time has come, and whether there are
// orphans.
func (s *shard) debris() (expired, orphans bool) {
	s.note(s.look.QueryRow(s.store.now().UnixMilli()).Scan(&expired, &orphans)) // on an error: not now
	return expired, orphans
}

// tidy deletes what has expired and what is orphaned, in turn, and returns free
// pages to the file system: all of them when space is short, all but a few when
// the shard is idle, and while it is busy, and will reuse them, what exceeds half
// of the file.
func (s *shard) tidy() error {
	pressed := s.store.pressed()
	if pressed {
		if err := s.slice((*writer).truncateWAL); err != nil {
			return err
		}
	}
	for more := true; more; {
		expired, orphans := s.debris()
		if more = expired; expired {
			if err := s.slice((*writer).expire); err != nil {
				return err
			}
		}
		if orphans {
			err := s.slice(func(w *writer) error {
				swept, err := w.sweep(func() (int64, error) { return s.victim(w) })
				more = more || swept
				return err
			})
			if err != nil {
				return err
			}
		}
	}
	writes := s.writes.Load()
	busy := writes != s.seenWrites
	if s.seenWrites = writes; busy {
		s.upkeepDue.Store(true) // to look again at the next tick
	}
	before := int64(math.MaxInt64)
	for {
		var free, pages int64
		err := s.slice(func(w *writer) error {
			err := w.db.QueryRow("SELECT * FROM pragma_freelist_count, pragma_page_count").Scan(&free, &pages)
			keep := int64(vacuumPages)
			switch {
			case pressed:
				keep = 0
			case busy:
				keep = max(keep, pages/2)
			}
			if err != nil || free <= keep || free >= before { // or somebody turned auto_vacuum off
				free = 0
				return err
			}
			_, err = w.db.Exec(fmt.Sprintf("PRAGMA incremental_vacuum(%d)", vacuumPages))
			return err
		})
		if err != nil {
			return err
		}
		if free > 0 {
			before = free
			continue
		}
		switch { // the file shrinks with the checkpoint
		case pressed:
			return s.slice((*writer).truncateWAL)
		case before != math.MaxInt64:
			return s.slice(func(w *writer) error { _, err := w.db.Exec("PRAGMA wal_checkpoint(PASSIVE)"); return err })
		}
		return nil
	}
}

// makeRoom runs f, which found the disk full and frees space in the end, with
// the reserve's room and, if that is gone already, the WAL's. It is for the
// batcher's goroutine.
func (s *shard) makeRoom(f func() error) error {
	s.wakeUpkeep()
	return s.store.lendReserve(func() error {
		err := f()
		if errors.Is(err, errFull) && s.writer.truncateWAL() == nil {
			err = f()
		}
		return err
	})
}

// victim returns an orphan that nobody reads or uploads, or 0. It is for the
// batcher's goroutine, where no upload is published meanwhile. Under the
// exclusive lookups lock every reader that found the content holds it, and no
// new one can find it.
func (s *shard) victim(w *writer) (victim int64, err error) {
	s.lookups.Lock()
	defer s.lookups.Unlock()
	rows, err := w.db.Query("SELECT id FROM orphans")
	if err != nil {
		return 0, err
	}
	defer rows.Close()
	s.heldMu.Lock()
	defer s.heldMu.Unlock()
	for rows.Next() {
		var id int64
		if err := rows.Scan(&id); err != nil {
			return 0, err
		}
		if s.held[id] == 0 {
			return id, nil
		}
	}
	return 0, rows.Err()
}

// slice runs one piece of upkeep on the batcher's goroutine, between the
// writes, and then pauses for as long as it took.
func (s *shard) slice(f func(*writer) error) error {
	var took time.Duration
	o := &op{urgent: true, alone: func(w *writer) error {
		start := time.Now()
		defer func() { took = time.Since(start) }()
		err := translate(f(w))
		if errors.Is(err, errFull) && s.store.reserved.Load() {
			err = s.makeRoom(func() error { return translate(f(w)) })
		}
		return err
	}}
	if !s.batcher.add(o) {
		return errStopping
	}
	<-o.done
	select {
	case <-s.store.stop:
		return errStopping
	case <-time.After(took):
	}
	return o.err
}

// room reports whether writes other than deletes may use the disk.
func (st *store) room() error {
	if st.reserved.Load() {
		return nil
	}
	return st.takeReserve()
}

// takeReserve writes the reserve file if it is not there, and tries that once
// in a reserveInterval at most. An error is an errFull.
func (st *store) takeReserve() error {
	st.reserveMu.Lock()
	defer st.reserveMu.Unlock()
	if st.reserved.Load() {
		return nil
	}
	if time.Since(st.reserveTried) < reserveInterval {
		return errFull
	}
	noise := make([]byte, reserveBytes)
	rand.Read(noise) // of which no file system makes a hole
	path := filepath.Join(st.dir, reserveFile)
	if err := os.WriteFile(path, noise, 0o644); err != nil {
		os.Remove(path)
		st.reserveTried = time.Now()
		return fmt.Errorf("%w: no room for the reserve: %w", errFull, err)
	}
	st.reserved.Store(true)
	return nil
}

// lendReserve gives up the reserve and runs f, which frees space in the end,
// before anybody can take it back.
func (st *store) lendReserve(f func() error) error {
	st.reserveMu.Lock()
	defer st.reserveMu.Unlock()
	st.dropReserve()
	return f()
}

// dropReserve removes the reserve file.
func (st *store) dropReserve() {
	st.reserved.Store(false)
	os.Remove(filepath.Join(st.dir, reserveFile)) // missing is as good
}

// ============================================================================
// Maintenance
//
// Commands over a data directory that a server may be using: they read it as
// any other SQLite client would, in a process of their own. What they find goes
// to standard output, how far they are to a terminal on standard error.
// ============================================================================

// progress shows how far long work has come, where somebody watches.
type progress struct {
	w            io.Writer // nil: nobody does
	what         string
	blobs, bytes int64
	shown        time.Time
}

func (c *call) newProgress(what string) *progress {
	p := &progress{what: what}
	if f, ok := c.stderr.(*os.File); ok {
		if info, err := f.Stat(); err == nil && info.Mode()&os.ModeCharDevice != 0 {
			p.w = f
		}
	}
	return p
}

func (p *progress) add(blobs, bytes int64) {
	p.blobs, p.bytes = p.blobs+blobs, p.bytes+bytes
	if p.w != nil && time.Since(p.shown) > 200*time.Millisecond {
		p.shown = time.Now()
		fmt.Fprintf(p.w, "\r%s: %s ", p.what, strings.TrimPrefix(p.String(), "0 blobs, ")) // backup copies pages
	}
}

func (p *progress) String() string {
	return fmt.Sprintf("%d blobs, %.1f MiB", p.blobs, float64(p.bytes)/(1<<20))
}

// done ends the line on the terminal.
func (p *progress) done() {
	if p.w != nil && !p.shown.IsZero() {
		fmt.Fprintln(p.w)
	}
}

// pacer keeps long work from taking the machine from a running server: a nil
// one does not.
type pacer struct{ worked time.Time }

// pause pauses for some times as long as the work took since the last pause.
func (p *pacer) pause() {
	if p == nil {
		return
	}
	if took := time.Since(p.worked); took > sliceTime {
		time.Sleep(paceFactor * took)
		p.worked = time.Now()
	}
}

// dataDir is the directory a command works on, from the configuration.
func (c *call) dataDir() (string, error) {
	cfg, _, err := loadConfig(c.configFile, c.environ)
	if err != nil {
		return "", err
	}
	return filepath.Abs(cfg.DataDir)
}

// cmdCheck verifies a data directory, in use or not.
func cmdCheck(ctx context.Context, c *call) error {
	args, err := c.parse(nil, 0, 1)
	if err != nil {
		return err
	}
	var dir string
	if len(args) > 0 {
		dir, err = filepath.Abs(args[0])
	} else {
		dir, err = c.dataDir()
	}
	if err != nil {
		return err
	}
	if err := unfinished(dir); err != nil {
		return err
	}
	k := &checker{dir: dir, out: c.stdout, progress: c.newProgress("checking")}
	err = k.check(ctx)
	k.progress.done()
	if err != nil {
		return err
	}
	fmt.Fprintf(c.stdout, "%s: %d shards, %s, %d defects\n", dir, k.shards, k.progress, k.defects)
	if k.defects > 0 {
		return fmt.Errorf("%s has defects; restore what is damaged from a backup", dir)
	}
	return nil
}

// checker verifies a directory and counts its defects, each of which is a line
// on out.
type checker struct {
	dir      string
	out      io.Writer
	progress *progress
	pacer    *pacer
	want     *progress // of a copy: how much it is to be; nil: nobody knows
	shards   int
	defects  int
}

func (k *checker) defect(shard int, format string, args ...any) {
	k.defects++
	fmt.Fprintf(k.out, "shard %d: %s\n", shard, strings.ReplaceAll(fmt.Sprintf(format, args...), "\n", " "))
}

// check returns an error where there is nothing to check.
func (k *checker) check(ctx context.Context) error {
	indexes, err := shardFiles(k.dir)
	if err != nil {
		return fmt.Errorf("cannot read the data directory: %w", err)
	}
	if err := refuseForeign(k.dir); err != nil {
		return err
	}
	var first *record
	found := map[int]*record{}
	for _, i := range indexes {
		k.shards++
		r, err := k.checkShard(ctx, i)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err = translate(err); unseen(err) {
			return fmt.Errorf("cannot check shard %d: %w", i, err)
		}
		if err != nil {
			k.defect(i, "%v", err)
		}
		if found[i] = r; first == nil {
			first = r
		}
	}
	switch {
	case k.shards == 0:
		return fmt.Errorf("%s holds no shards", k.dir)
	case first == nil:
		return nil // each has its line
	}
	for i, missing := 0, 0; i < int(first.NumShards); i++ {
		if r, there := found[i]; !there && missing == 100 { // or the number is not what it was
			k.defect(i, "the file is missing, perhaps as all others of %d shards", first.NumShards)
			break
		} else if !there {
			missing++
			k.defect(i, "the file is missing")
		} else if r != nil && (r.NumShards != first.NumShards || r.Hash != first.Hash || r.Directory != first.Directory || r.Shard != int64(i)) {
			k.defect(i, "it says that it is shard %d of %d by %s in directory %s, not %d of %d by %s in %s",
				r.Shard, r.NumShards, r.Hash, r.Directory, i, first.NumShards, first.Hash, first.Directory)
		}
	}
	for i := range found {
		if i >= int(first.NumShards) {
			k.defect(i, "the directory has only %d shards", first.NumShards)
		}
	}
	return nil
}

const strayQuery = `WITH RECURSIVE content (id) AS (
		SELECT min(id) >> 20 FROM chunks
		UNION ALL SELECT (SELECT min(id) >> 20 FROM chunks WHERE id >= (content.id + 1) << 20) FROM content WHERE id IS NOT NULL)
	SELECT id FROM content WHERE id IS NOT NULL AND NOT EXISTS (SELECT 1 FROM orphans WHERE orphans.id = content.id)
		AND NOT EXISTS (SELECT 1 FROM blobs WHERE blobs.id = content.id AND size > ?)`

// checkShard checks one shard and returns its record, if that can be read. An
// error is one more defect, or keeps it from being checked.
func (k *checker) checkShard(ctx context.Context, i int) (_ *record, err error) {
	s := &shard{index: i}
	defer func() { err = cmp.Or(err, s.close()) }()
	path := filepath.Join(k.dir, shardName(i))
	if err := refuseEmpty(path); err != nil {
		return nil, err
	}
	err = openLive(path, func(params string) error { return cmp.Or(s.close(), s.openReaders(path, params)) })
	if err != nil {
		return nil, err
	}
	r, err := recordOf(s.readers)
	if err != nil {
		return nil, err
	}
	if hashes[r.Hash] == nil || r.NumShards < 1 {
		return nil, fmt.Errorf("%w: %d shards by %q", errCorrupt, r.NumShards, r.Hash)
	}
	var v, application int64
	if err := s.readers.QueryRow("SELECT * FROM pragma_user_version, pragma_application_id").Scan(&v, &application); err != nil {
		return r, err
	}
	if v > schemaVersion {
		k.defect(i, "%v", newerSchema(v))
	} else if v != schemaVersion {
		k.defect(i, "its schema is version %d, not %d", v, schemaVersion)
	}
	if application != applicationID {
		k.defect(i, "its header says that it belongs to program %#x, not %#x", application, applicationID)
	}
	err = queryAll(s.readers, func(text string) {
		if text != "ok" {
			k.defect(i, "SQLite: %s", text)
		}
	}, "PRAGMA integrity_check")
	if err != nil {
		return r, err
	}
	if err := k.checkSchema(s); err != nil {
		return r, err
	}
	// A content that comes or goes meanwhile is seen whole or not at all: each
	// of these looks is one statement, and a blob that is gone when its chunks
	// are looked for is none of the shard's any more.
	var off int64
	if err := s.readers.QueryRow(`SELECT abs(blobs - (SELECT count(*) FROM blobs)) + abs(bytes - (SELECT coalesce(sum(size), 0) FROM blobs)) +
		abs(orphans - (SELECT count(*) FROM orphans)) FROM totals`).Scan(&off); err != nil {
		return r, err
	} else if off != 0 {
		k.defect(i, "the totals are not those of its blobs and orphans")
	}
	if err := queryAll(s.readers, func(id int64) { k.defect(i, "content %d has chunks that no blob and no orphan mentions", id) }, strayQuery, chunkSize); err != nil {
		return r, err
	}
	return r, k.checkBlobs(ctx, s, r)
}

// checkBlobs checks each blob of s.
func (k *checker) checkBlobs(ctx context.Context, s *shard, r *record) error {
	row, err := s.readers.Prepare("SELECT key, " + blobColumns + ", data FROM blobs WHERE id > ? ORDER BY id LIMIT 1")
	if err != nil {
		return err
	}
	var last int64 // what is new since we came is not checked, or a busy shard were never done
	if err := s.readers.QueryRow("SELECT coalesce(max(id), ?) FROM blobs", math.MinInt64).Scan(&last); err != nil {
		return err
	}
	for id := int64(math.MinInt64); id < last && ctx.Err() == nil; {
		key, b, err := nextBlob(row, id)
		if b == nil && err == nil {
			break
		}
		there := true
		if b == nil { // a row that cannot be read is one defect, not the end
			raw := s.readers.QueryRow("SELECT id, CAST(key AS BLOB) FROM blobs WHERE id > ? ORDER BY id LIMIT 1", id)
			if raw.Scan(&id, &key) != nil {
				return err
			}
		} else {
			if id = b.id; err == nil {
				err = s.verify(b)
			}
			if err != nil && s.readers.QueryRow("SELECT EXISTS (SELECT 1 FROM blobs WHERE id = ?)", id).Scan(&there) != nil {
				there = true
			}
		}
		if err = translate(err); unseen(err) {
			return err
		}
		if err != nil && there {
			k.defect(s.index, "key %q: %v", key, err)
		}
		if b == nil {
			continue
		}
		if err := checkKey(key); err != nil {
			k.defect(s.index, "key %q: %v", key, err)
		}
		if home := hashes[r.Hash](key) % uint64(r.NumShards); home != uint64(s.index) {
			k.defect(s.index, "key %q: it belongs to shard %d", key, home)
		}
		k.progress.add(1, b.size)
		k.pacer.pause()
	}
	return ctx.Err()
}

// unseen reports whether err says nothing of what is in a shard.
func unseen(err error) bool {
	return sealed(err) || errors.Is(err, errBusy)
}

// queryAll calls row with the one column of each row of a query.
func queryAll[T any](db *sql.DB, row func(T), query string, args ...any) error {
	rows, err := db.Query(query, args...)
	if err != nil {
		return err
	}
	defer rows.Close()
	for rows.Next() {
		var v T
		if err := rows.Scan(&v); err != nil {
			return err
		}
		row(v)
	}
	return rows.Err()
}

// nextBlob returns the first blob behind id with its data, nil when there is
// none. An error beside a blob concerns that blob alone.
func nextBlob(row *sql.Stmt, id int64) (key string, b *blob, err error) {
	rows, err := row.Query(id)
	if err != nil {
		return "", nil, err
	}
	defer rows.Close()
	if !rows.Next() {
		return "", nil, rows.Err()
	}
	var data sql.RawBytes
	b, err = scanBlob(rows, &key, &data)
	if b != nil && !b.chunked() {
		b.data = bytes.Clone(data)
	}
	return key, b, err
}

// checkSchema compares what is ours in the schema with what it is to be. Other
// tools may have added to it.
func (k *checker) checkSchema(s *shard) error {
	model, err := sql.Open("sqlite", ":memory:")
	if err != nil {
		return err
	}
	defer model.Close()
	model.SetMaxOpenConns(1) // another connection would have another memory
	if _, err := model.Exec(schema); err != nil {
		return err
	}
	var want, got []string
	for db, to := range map[*sql.DB]*[]string{model: &want, s.readers: &got} {
		add := func(text string) { *to = append(*to, sqlNoise.ReplaceAllString(text, " ")) }
		if err := queryAll(db, add, "SELECT type || ' ' || name || ' ' || coalesce(sql, '') FROM sqlite_schema"); err != nil {
			return err
		}
	}
	for _, text := range want {
		if !slices.Contains(got, text) {
			k.defect(s.index, "the schema lacks, or has otherwise: %s", text)
		}
	}
	return nil
}

// sqlNoise is what may differ between two texts of the same statement.
var sqlNoise = regexp.MustCompile(`(?:--[^\n]*|\s)+`)

// verify reads the content of b and compares it with what b says of it.
func (s *shard) verify(b *blob) error {
	if !b.chunked() {
		if err := b.fits(len(b.data)); err != nil {
			return err
		}
	} else {
		var chunks, stored int64
		if err := s.readers.QueryRow("SELECT count(*), coalesce(sum(length(data)), 0) FROM chunks WHERE id >= ?1 << 20 AND id < (?1 + 1) << 20", b.id).Scan(&chunks, &stored); err != nil {
			return err
		}
		if chunks != b.lastSeq()+1 || stored != b.stored {
			return fmt.Errorf("%w: %d chunks of %d bytes where there are to be %d of %d", errCorrupt, chunks, stored, b.lastSeq()+1, b.stored)
		}
	}
	hash, crc := sha256.New(), uint32(0)
	c := &content{shard: s, blob: b}
	for seq := range b.lastSeq() + 1 {
		if err := c.load(seq); err != nil {
			return err
		}
		hash.Write(c.chunk)
		if b.codec == deflated {
			crc = crc32.Update(crc, crc32.IEEETable, c.chunk)
		}
	}
	if sum := hash.Sum(nil); !bytes.Equal(sum, b.sum[:]) || crc != b.crc {
		return fmt.Errorf("%w: the content's SHA-256 is %x and its CRC-32 %08x, not %x and %08x", errCorrupt, sum, crc, b.sum, b.crc)
	}
	return nil
}

// cmdBackup copies the data directory, in use or not, into a new one. Each shard
// is as it was at one moment, when its turn came. The copy is made and verified
// beside its place, and has its name only when it is complete and synced.
func cmdBackup(ctx context.Context, c *call) error {
	args, err := c.parse(nil, 1, 1)
	if err != nil {
		return err
	}
	from, err := c.dataDir()
	if err != nil {
		return err
	}
	to, err := claim(args[0])
	if err != nil {
		return err
	}
	if err := cmp.Or(unfinished(from), refuseForeign(from)); err != nil {
		return err
	}
	start := time.Now()
	shards, err := shardCount(from)
	if err != nil {
		return err
	}
	var pace *pacer
	if inUse(from) {
		pace = &pacer{time.Now()}
	}
	k := &checker{pacer: pace}
	err = c.copyInto(ctx, to, k, func(partial string, _ *sql.DB) error {
		p := c.newProgress("copying")
		defer p.done()
		for i := range shards {
			if err := copyShard(ctx, filepath.Join(from, shardName(i)), filepath.Join(partial, shardName(i)), p, pace); err != nil {
				return fmt.Errorf("cannot copy shard %d: %w", i, err)
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	fmt.Fprintf(c.stdout, "%s: %d shards, %s, copied and verified in %.1f s\n", to, k.shards, k.progress, time.Since(start).Seconds())
	return nil
}

// copyInto has fill make a copy, checks that by k and gives it its name, to.
// Until then it is a directory beside that, locked and marked, of which nothing is
// left when something fails; the mark goes when it has its name.
func (c *call) copyInto(ctx context.Context, to string, k *checker, fill func(partial string, lock *sql.DB) error) (err error) {
	partial := to + ".partial"
	lock, err := clearPartial(partial)
	if err != nil {
		return err
	}
	defer func() {
		if err == nil {
			return
		}
		discard := emptyPartial(partial)
		if discard == nil { // the marker goes last, else what is left could pass for whole
			discard = os.RemoveAll(partial)
		}
		err = errors.Join(err, discard, lock.Close())
	}()
	if there, err := os.Stat(to); err == nil { // an empty directory is there, and perhaps not for everybody
		if err := os.Chmod(partial, there.Mode().Perm()); err != nil {
			return err
		}
	}
	if err := fill(partial, lock); err != nil {
		return err
	}
	k.dir, k.out, k.progress = partial, c.stdout, c.newProgress("verifying")
	err = k.check(ctx)
	k.progress.done()
	switch want := k.want; {
	case err != nil:
		return err
	case k.defects > 0:
		return fmt.Errorf("the copy has %d defects, perhaps as the original: check that; nothing was copied", k.defects)
	case want != nil && (k.progress.blobs != want.blobs || k.progress.bytes != want.bytes):
		return fmt.Errorf("%s were copied, but %s are there", want, k.progress)
	}
	return nameCopy(partial, to, lock)
}

// nameCopy gives the complete directory partial its name, to.
func nameCopy(partial, to string, lock *sql.DB) error {
	for _, step := range []func() error{
		func() error { return syncDir(partial) },
		func() error {
			if there, err := os.Stat(to); err != nil || !there.IsDir() {
				return nil
			}
			return os.Remove(to) // it is empty
		},
		func() error {
			if runtime.GOOS == "windows" { // where nothing that is open can be renamed
				return lock.Close()
			}
			return nil
		},
		func() error { return os.Rename(partial, to) },
		func() error { return syncDir(filepath.Dir(to)) },
		// The lock before the marker, else a server that waits for it gets one
		// that no other server meets; both after the rename, else a crash leaves a
		// copy that the next run does not know.
		func() error { return os.Remove(filepath.Join(to, lockFile)) },
		lock.Close,
		func() error { return os.Remove(filepath.Join(to, partialFile)) },
		func() error { return syncDir(to) },
	} {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

// claim returns the absolute path of dir, links resolved, where nothing is, or
// an empty directory whose place the copy can take: it is moved away and back, as
// a mount point cannot be. What a run that was killed after its rename has left
// there goes back to DIR.partial, which clearPartial clears.
func claim(dir string) (string, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return "", err
	}
	for range 10 { // links, also one to what a killed run has taken away
		link, err := os.Readlink(dir)
		if err != nil {
			break
		}
		if !filepath.IsAbs(link) {
			link = filepath.Join(filepath.Dir(dir), link)
		}
		dir = link
	}
	if unfinished(dir) != nil {
		lock, err := lockDir(dir)
		if err == nil {
			err = errors.Join(lock.Close(), os.Rename(dir, dir+".partial"))
		}
		if err != nil {
			return "", err
		}
	}
	left, err := os.ReadDir(dir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return dir, nil
	case err != nil:
		return "", fmt.Errorf("cannot copy into %s: %w", dir, err)
	case len(left) > 0:
		return "", fmt.Errorf("%s is not empty; a copy needs a new directory", dir)
	}
	away := dir + "." + rand.Text()
	if err := cmp.Or(os.Rename(dir, away), os.Rename(away, dir)); err != nil { // now rather than after all the work
		return "", fmt.Errorf("cannot take the place of %s, is it a mount point? Name a directory in it: %w", dir, err)
	}
	return dir, nil
}

// shardCount returns how many shards dir holds, all of which are there.
func shardCount(dir string) (int, error) {
	r := &record{NumShards: 1} // at least; the first one says how many
	for i := 0; i < int(r.NumShards); i++ {
		path := filepath.Join(dir, shardName(i))
		err := refuseEmpty(path)
		if err == nil && i == 0 {
			err = openLive(path, func(params string) (err error) {
				db := openReadOnly(path, params)
				r, err = recordOf(db)
				return cmp.Or(err, db.Close())
			})
		}
		if err != nil {
			return 0, fmt.Errorf("cannot read %s: %w", path, err)
		}
	}
	return int(r.NumShards), nil
}

// inUse reports whether a server of ours holds dir.
func inUse(dir string) bool {
	if !fileExists(filepath.Join(dir, lockFile)) {
		return false
	}
	lock, err := lockDir(dir)
	if err != nil {
		return errors.Is(err, errInUse)
	}
	return lock.Close() != nil
}

// clearPartial makes dir an empty directory that is ours until lock is closed:
// what an interrupted run left there goes, and anything else is an error.
func clearPartial(dir string) (lock *sql.DB, err error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	inTheWay := func() error {
		left, err := os.ReadDir(dir)
		others := slices.ContainsFunc(left, func(e fs.DirEntry) bool { return e.Name() != lockFile })
		if info, statErr := os.Lstat(dir); statErr == nil && !info.IsDir() || others && unfinished(dir) == nil {
			err = fmt.Errorf("%s is in the way, and is nothing that this command has left; take it away", dir)
		}
		return err
	}
	if err := inTheWay(); err != nil {
		return nil, err
	}
	if lock, err = lockDir(dir); err != nil {
		return nil, err
	}
	if err = inTheWay(); err == nil { // another run may have completed it meanwhile
		err = os.WriteFile(filepath.Join(dir, partialFile), nil, 0o644) // before anything else: what is unfinished says so
	}
	if err == nil {
		err = emptyPartial(dir)
	}
	if err != nil {
		return nil, errors.Join(err, lock.Close())
	}
	return lock, nil
}

// emptyPartial removes all of dir but the lock and the marker, which must outlast
// the rest.
func emptyPartial(dir string) error {
	left, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	for _, e := range left {
		if e.Name() != partialFile && e.Name() != lockFile {
			err = cmp.Or(err, os.RemoveAll(filepath.Join(dir, e.Name())))
		}
	}
	return err
}

// unfinished returns an error where backup or migrate has not completed dir.
func unfinished(dir string) error {
	if fileExists(filepath.Join(dir, partialFile)) {
		return fmt.Errorf("%s is what an interrupted backup or migrate has left; run that again, or remove the directory", dir)
	}
	return nil
}

// copyShard copies a database, page by page, as it is at one moment.
func copyShard(ctx context.Context, from, to string, p *progress, pace *pacer) (err error) {
	var db *sql.DB
	var page int64
	err = openLive(from, func(params string) error {
		if db != nil {
			db.Close()
		}
		db = openReadOnly(from, params)
		db.SetMaxOpenConns(1)
		// The transaction is the moment: without it the copy would begin anew
		// with every write of the server.
		if _, err := db.Exec("BEGIN"); err != nil {
			return err
		}
		return db.QueryRow("SELECT page_size FROM pragma_page_size, (SELECT 1 FROM meta LIMIT 1)").Scan(&page)
	})
	defer func() { err = cmp.Or(err, db.Close()) }()
	if err != nil {
		return err
	}
	conn, err := db.Conn(ctx)
	if err != nil {
		return err
	}
	defer conn.Close()
	return conn.Raw(func(driver any) error {
		source, ok := driver.(interface {
			NewBackup(uri string) (*sqlite.Backup, error)
		})
		if !ok {
			return errors.New("the SQLite driver cannot copy")
		}
		b, err := source.NewBackup(dbURI(to, ""))
		if err != nil {
			return err
		}
		for more := true; more && err == nil; {
			left := b.Remaining()
			if more, err = b.Step(copyPages); left > 0 {
				p.add(0, int64(left-b.Remaining())*page)
			}
			if err == nil {
				err = ctx.Err()
			}
			pace.pause()
		}
		return cmp.Or(err, b.Finish())
	})
}

// cmdMigrate copies the blobs of a directory into the configured one, which is
// new. It reads every row of every shard, wherever it lies; what decides between
// two copies of a key is where the source's hash places it.
func cmdMigrate(ctx context.Context, c *call) (err error) {
	flags := flag.NewFlagSet("", flag.ContinueOnError)
	codec := flags.String("codec", "", "")
	gunzip := flags.Bool("gunzip", false, "")
	skipInvalid := flags.Bool("skip-invalid", false, "")
	args, err := c.parse(flags, 1, 1)
	if err != nil {
		return err
	}
	if *codec != "" && *codec != "gzip" || *codec != "" && *gunzip {
		return usageError(fmt.Sprintf("-codec %s: only gzip can be read, and not with -gunzip; have the server that wrote it write it uncompressed", *codec))
	}
	cfg, _, err := loadConfig(c.configFile, c.environ)
	if err != nil {
		return err
	}
	to, err := claim(cfg.DataDir)
	if err != nil {
		return err
	}
	m := &migration{call: c, log: newLogger(cfg, c.stderr), start: time.Now(), codec: *codec, gunzip: *gunzip, progress: c.newProgress("copying")}
	defer func() { err = errors.Join(err, m.close()) }()
	if err := m.open(args[0]); err != nil {
		return err
	}
	if err := m.findInvalid(*skipInvalid); err != nil {
		return err
	}
	target := *cfg
	target.AsyncWrite, target.Durability, target.BatchSize, target.MaxPendingBytes = true, "normal", 64, migratePending
	k := &checker{want: m.progress}
	err = c.copyInto(ctx, to, k, func(partial string, lock *sql.DB) (err error) {
		if m.to, err = openLocked(partial, lock, &target, m.log, func() time.Time { return m.start }); err != nil {
			return err
		}
		err = m.copyAll(ctx)
		m.progress.done()
		return cmp.Or(err, m.to.closeDatabases()) // what could not be written will be missing
	})
	if err != nil {
		return err
	}
	summary := fmt.Sprintf("%s: %s copied and verified in %.1f s; dropped: %d expired, %d with invalid keys, %d found twice",
		to, k.progress, time.Since(m.start).Seconds(), m.expired, m.invalid, m.twice)
	if m.gunzip || m.codec != "" {
		summary += fmt.Sprintf("; unpacked %d, kept %d as they were", m.unpacked, m.progress.blobs-m.unpacked)
	}
	fmt.Fprintln(c.stdout, summary)
	return nil
}

// migration is one run of migrate.
type migration struct {
	*call
	log      *slog.Logger
	codec    string // of a Blobasaur's contents
	gunzip   bool   // what is valid gzip
	progress *progress
	to       *store
	start    time.Time // nothing expires on the way

	dir    string
	files  []string // of the source, and their stamps when they were opened
	stamps string
	tables []*sourceTable
	homes  func(key string) int // the shard a key belongs to; nil: nobody knows, as where there are namespaces
	undo   []func() error       // in reverse

	expired, invalid, twice, unpacked int64
}

// sourceTable is a table with blobs in one shard of the source.
type sourceTable struct {
	shard     *shard // of which only the readers are there
	name      string
	namespace string // before each key, with its slash
	ours      bool
	unique    bool      // all keys are TEXT, each there once; a BLOB of the same bytes is another key to SQLite, not to us
	row       *sql.Stmt // by rowid
	root      int64     // page of the table
	column    int       // of the content in its records
}

func (m *migration) close() error {
	var errs []error
	for _, undo := range slices.Backward(m.undo) {
		errs = append(errs, undo())
	}
	m.undo = nil
	return errors.Join(errs...)
}

// open opens the source, of which it changes nothing.
func (m *migration) open(dir string) (err error) {
	if m.dir, err = filepath.Abs(dir); err != nil {
		return err
	}
	indexes, err := shardFiles(m.dir)
	if err != nil {
		return fmt.Errorf("cannot read the source: %w", err)
	}
	if err := unfinished(m.dir); err != nil {
		return err
	}
	if fileExists(filepath.Join(m.dir, lockFile)) { // else no server of ours was ever there
		lock, err := lockDir(m.dir)
		switch {
		case err == nil:
			m.undo = append(m.undo, lock.Close)
		case !errors.Is(err, errAccess): // on read-only media; who writes to it all the same is seen in the end
			return err
		}
	}
	if len(indexes) == 0 {
		return fmt.Errorf("%s holds no shards", m.dir)
	}
	for _, i := range indexes {
		path, err := filepath.EvalSymlinks(filepath.Join(m.dir, shardName(i)))
		if err != nil {
			return err
		}
		m.files = append(m.files, path, path+"-wal")
	}
	m.stamps = fileStamps(m.files...)
	for i := range indexes { // which they are, or one is missing
		if err := m.openShard(i, len(indexes)); err != nil {
			return fmt.Errorf("cannot read %s: %w", filepath.Join(m.dir, shardName(i)), translate(err))
		}
	}
	return nil
}

func (m *migration) openShard(i, shards int) error {
	path := filepath.Join(m.dir, shardName(i))
	if err := refuseEmpty(path); err != nil {
		return err
	}
	s := &shard{index: i}
	m.undo = append(m.undo, s.close)
	var encoding string
	err := openQuietly(path, func(params string) error {
		err := s.close()
		s.readers = openReadOnly(path, params)
		return cmp.Or(err, s.readers.QueryRow("SELECT encoding FROM pragma_encoding, (SELECT count(*) FROM sqlite_schema)").Scan(&encoding))
	})
	if err != nil {
		return err
	}
	if encoding != "UTF-8" {
		return fmt.Errorf("its texts are %s, only UTF-8 can be read", encoding)
	}
	var names []string
	err = queryAll(s.readers, func(name string) { names = append(names, name) },
		"SELECT name FROM sqlite_schema WHERE type = 'table' AND (name IN ('blobs', 'meta') OR name LIKE 'blobs\\_%' ESCAPE '\\')")
	if err != nil {
		return err
	}
	if !slices.Contains(names, "blobs") {
		return errors.New("it has no table of blobs")
	}
	if slices.Contains(names, "meta") {
		return m.openOurs(s, shards)
	}
	for _, name := range names {
		t, content, err := openForeign(s, name)
		if err != nil {
			return err
		}
		// Blobasaur, known by its tables, its column or its codec, places by a
		// ring of its own; Blobnom by FNV.
		if t.namespace != "" || content == "value" || m.codec != "" {
			m.homes = nil
		} else if i == 0 && len(names) == 1 {
			m.homes = func(key string) int { return int(hashes["fnv1a"](key) % uint64(shards)) }
		}
		m.tables = append(m.tables, t)
	}
	return nil
}

// openForeign opens a table of the Rust servers and returns the name of the column
// that has its contents.
func openForeign(s *shard, name string) (t *sourceTable, content string, err error) {
	var columns []string
	err = queryAll(s.readers, func(name string) { columns = append(columns, name) },
		"SELECT name FROM pragma_table_xinfo(?) WHERE hidden <> 2", name) // those that lie in its records
	if err != nil {
		return nil, "", err
	}
	content = "data"
	if !slices.Contains(columns, content) {
		content = "value"
	}
	if !slices.Contains(columns, "key") || !slices.Contains(columns, content) {
		return nil, "", fmt.Errorf("table %s has no columns key and data", name)
	}
	query := fmt.Sprintf("SELECT "+largeQuery, content, chunkSize)
	for _, column := range []string{"created_at", "updated_at", "expires_at", "version"} { // in seconds
		if !slices.Contains(columns, column) {
			column = "NULL"
		}
		query += ", " + column
	}
	t = &sourceTable{shard: s, name: name, column: slices.Index(columns, content)}
	if name != "blobs" {
		t.namespace = name[len("blobs_"):] + "/"
	}
	if t.row, err = s.readers.Prepare(fmt.Sprintf("%s FROM %s WHERE rowid = ?", query, quoteSQL(name))); err != nil {
		return nil, "", err
	}
	facts := fmt.Sprintf("SELECT rootpage, NOT EXISTS (SELECT 1 FROM %s WHERE typeof(key) <> 'text') FROM sqlite_schema WHERE type = 'table' AND name = ?", quoteSQL(name))
	err = s.readers.QueryRow(facts, name).Scan(&t.root, &t.unique)
	return t, content, err
}

// openOurs opens a shard of our own format.
func (m *migration) openOurs(s *shard, shards int) error {
	r, err := recordOf(s.readers)
	if err != nil {
		return err
	}
	hash := hashes[r.Hash]
	if hash == nil || r.NumShards != int64(shards) || r.Shard != int64(s.index) {
		return fmt.Errorf("it is shard %d of %d by %s, in a directory of %d", r.Shard, r.NumShards, r.Hash, shards)
	}
	if m.codec != "" || m.gunzip {
		return errors.New("it is of our own format, which knows its codecs: no -codec, no -gunzip")
	}
	m.homes = func(key string) int { return int(hash(key) % uint64(shards)) }
	t := &sourceTable{shard: s, name: "blobs", ours: true, unique: true}
	t.row, err = s.readers.Prepare("SELECT " + blobColumns + ", data FROM blobs WHERE id = ?")
	if err != nil {
		return err
	}
	s.chunk, err = s.readers.Prepare(chunkQuery)
	m.tables = append(m.tables, t)
	return err
}

func quoteSQL(name string) string { return `"` + strings.ReplaceAll(name, `"`, `""`) + `"` }

// each calls f with the rows of t.
func (t *sourceTable) each(f func(rowid int64, key string) error) error {
	rows, err := t.shard.readers.Query(fmt.Sprintf("SELECT rowid, CAST(key AS BLOB) FROM %s ORDER BY rowid", quoteSQL(t.name)))
	if err != nil {
		return err
	}
	defer rows.Close()
	for rows.Next() {
		var rowid int64
		var key []byte
		if err := rows.Scan(&rowid, &key); err != nil {
			return err
		}
		if err := f(rowid, t.namespace+string(key)); err != nil {
			return err
		}
	}
	return rows.Err()
}

// findInvalid lists the keys that our rules refuse.
func (m *migration) findInvalid(skip bool) error {
	for _, t := range m.tables {
		err := t.each(func(_ int64, key string) error {
			if err := checkKey(key); err != nil {
				m.invalid++
				fmt.Fprintf(m.stdout, "shard %d: key %q: %v\n", t.shard.index, key, err)
			}
			return nil
		})
		if err != nil {
			return fmt.Errorf("cannot read table %s of shard %d: %w", t.name, t.shard.index, translate(err))
		}
	}
	if m.invalid > 0 && !skip {
		return fmt.Errorf("%d keys cannot be taken over; -skip-invalid leaves them out", m.invalid)
	}
	return nil
}

// copyAll copies every row, but a misplaced one only if its key is not also in the
// shard it belongs to. Where two rows may have one key the write creates only, so
// that the second one fails instead of replacing the first.
func (m *migration) copyAll(ctx context.Context) error {
	for _, t := range m.tables {
		err := t.each(func(rowid int64, key string) error {
			if checkKey(key) != nil {
				return ctx.Err()
			}
			placed := m.homes != nil && m.homes(key) == t.shard.index
			twice, err := false, error(nil)
			if !placed && m.homes != nil {
				twice, err = m.atHome(t, key)
			}
			if err == nil && !twice {
				var c *conditions
				if !placed || !t.unique {
					c = &conditions{noneMatch: tags{"*"}}
				}
				err = m.copy(t, rowid, key, c)
			}
			if errors.Is(err, errCondition) {
				err = errors.New("it is there more than once, and nothing says which copy counts; remove the others")
			}
			if err != nil {
				return fmt.Errorf("key %q in table %s of shard %d: %w", key, t.name, t.shard.index, translate(err))
			}
			return ctx.Err()
		})
		if err != nil {
			return err
		}
	}
	if fileStamps(m.files...) != m.stamps {
		return fmt.Errorf("%s was written to meanwhile; stop its server, and run this again", m.dir)
	}
	return nil
}

// atHome reports whether a key of t, which does not belong there, is also where
// it belongs: then that copy counts, expired or not.
func (m *migration) atHome(t *sourceTable, key string) (twice bool, err error) {
	home := m.homes(key)
	i := slices.IndexFunc(m.tables, func(t *sourceTable) bool { return t.shard.index == home })
	err = m.tables[i].shard.readers.QueryRow("SELECT EXISTS (SELECT 1 FROM blobs WHERE key = ?)", key).Scan(&twice)
	if twice {
		m.twice++
		fmt.Fprintf(m.stdout, "key %q: in shard %d, where it belongs, and in shard %d: the first is taken\n", key, home, t.shard.index)
	}
	return twice, err
}

// copy copies one row.
func (m *migration) copy(t *sourceTable, rowid int64, key string, c *conditions) error {
	rows, err := t.row.Query(rowid)
	if err != nil {
		return err
	}
	defer rows.Close() // until then the row's data is valid
	b, open, err := t.content(rows, rowid)
	if err != nil {
		return err
	}
	if b.expired(m.start.UnixMilli()) {
		m.expired++
		return nil
	}
	p := &putOptions{contentType: b.contentType, length: b.size, conditions: c, copyOf: b}
	if t.ours {
		p.verify = func(sum []byte) error {
			if !bytes.Equal(sum, b.sum[:]) {
				return fmt.Errorf("%w: its SHA-256 is %x, not %x", errCorrupt, sum, b.sum)
			}
			return nil
		}
	}
	body, err := m.unpack(key, open, p)
	if err != nil {
		return err
	}
	s, err := m.to.shardOf(key)
	if err != nil {
		return err
	}
	stored, _, err := s.put(key, body, p)
	if err != nil {
		return err
	}
	m.progress.add(1, stored.size)
	if p.length < 0 {
		m.unpacked++
	} else if stored.size != b.size {
		return fmt.Errorf("%w: %d bytes could be read of %d", errCorrupt, stored.size, b.size)
	}
	return nil
}

// opener returns a content from its beginning.
type opener func() (io.Reader, error)

// unpack returns the content of a row, unpacked where that was asked for, and
// says in p when its length is not known. open is nil for NULL, which is empty.
func (m *migration) unpack(key string, open opener, p *putOptions) (io.Reader, error) {
	if open == nil {
		return strings.NewReader(""), nil
	}
	if m.codec == "" && !m.gunzip {
		return open()
	}
	packed, err := open()
	if err != nil {
		return nil, err
	}
	r, err := gzip.NewReader(packed)
	if err == nil {
		_, err = io.Copy(io.Discard, r) // all of it, before anything is written
	}
	switch {
	case err != nil && m.codec != "":
		return nil, fmt.Errorf("it is not %s: %w", m.codec, err)
	case err != nil:
		return open()
	}
	m.log.Debug("unpacked", "key", key)
	p.length = -1
	if packed, err = open(); err != nil {
		return nil, err
	}
	return r, r.Reset(packed)
}

// content returns what is in the one row of rows, whose content can be opened
// until rows is closed.
func (t *sourceTable) content(rows *sql.Rows, rowid int64) (b *blob, open opener, err error) {
	if !rows.Next() {
		return nil, nil, cmp.Or(rows.Err(), errors.New("the row is gone"))
	}
	var data sql.RawBytes
	if t.ours {
		b, err := scanBlob(rows, nil, &data)
		if err != nil {
			return nil, nil, err
		}
		if !b.chunked() {
			err = b.fits(len(data))
			b.data = bytes.Clone(data)
		}
		return b, func() (io.Reader, error) { return (&content{shard: t.shard, blob: b}).reader(), nil }, err
	}
	var size, created, updated, expires, version sql.NullInt64
	if err := rows.Scan(&data, &size, &created, &updated, &expires, &version); err != nil {
		return nil, nil, err
	}
	millis := func(seconds sql.NullInt64) int64 { return max(0, min(seconds.Int64, maxUnix)) * 1000 }
	now := sql.NullInt64{Int64: time.Now().Unix(), Valid: true}
	b = &blob{size: size.Int64, contentType: "application/octet-stream", version: max(0, min(version.Int64, 1<<53))} // as far as JSON counts
	if expires.Valid {
		b.expires = max(1, millis(expires)) // 0 would be never
	}
	b.created = millis(cmp.Or(created, now))
	b.updated = max(millis(cmp.Or(updated, now)), b.created)
	switch {
	case !size.Valid:
		return b, nil, nil
	case size.Int64 > chunkSize && len(data) == 0: // SQLite would have to hold all of it
		return b, func() (io.Reader, error) { return t.stream(rowid) }, nil
	}
	b.size = int64(len(data))
	return b, func() (io.Reader, error) { return bytes.NewReader(data), nil }, nil
}

// largeQuery returns the content of a row unless it is a large BLOB, and its
// size, which SQLite knows without reading it.
const largeQuery = `CASE WHEN typeof(%[1]s) = 'blob' AND octet_length(%[1]s) > %[2]d THEN NULL ELSE %[1]s END, octet_length(%[1]s)`

// stream returns the content of a row from the pages it lies on, one at a time:
// SQL has it only in one piece. What is read here is SQLite's file format, its
// B-tree pages, cells and records (sqlite.org/fileformat2.html).
func (t *sourceTable) stream(rowid int64) (_ io.Reader, err error) {
	defer func() {
		if v := recover(); v != nil { // pages that lead out of themselves
			err = fmt.Errorf("%w: %v", errCorrupt, v)
		}
	}()
	r := &pageReader{db: t.shard.readers}
	head, err := r.page(1)
	if err != nil {
		return nil, err
	}
	r.usable = len(head) - int(head[20])
	next := t.root
	for {
		page, err := r.page(next)
		if err != nil {
			return nil, err
		}
		cells, cell := int(binary.BigEndian.Uint16(page[3:])), func(i, header int) []byte {
			return page[binary.BigEndian.Uint16(page[header+2*i:]):]
		}
		switch page[0] {
		case 5: // interior: children up to a rowid each, and the rest
			i := sort.Search(cells, func(i int) bool { id, _ := varint(cell(i, 12)[4:]); return id >= rowid })
			if next = int64(binary.BigEndian.Uint32(page[8:])); i < cells {
				next = int64(binary.BigEndian.Uint32(cell(i, 12)))
			}
		case 13: // leaf: payload size, rowid, payload, and where it goes on
			i := sort.Search(cells, func(i int) bool {
				_, n := varint(cell(i, 8))
				id, _ := varint(cell(i, 8)[n:])
				return id >= rowid
			})
			rest := cell(i, 8) // beyond the last one: see recover
			size, n := varint(rest)
			id, n2 := varint(rest[n:])
			if rest = rest[n+n2:]; i == cells || id != rowid {
				return nil, fmt.Errorf("%w: the row is not on its page", errCorrupt)
			}
			local := int64(r.usable - 35)
			if size > local {
				least := int64((r.usable-12)*32/255 - 23)
				if over := least + (size-least)%int64(r.usable-4); over <= local {
					local = over
				} else {
					local = least
				}
				r.next = int64(binary.BigEndian.Uint32(rest[local:]))
			}
			r.left, r.rest = size, rest[:min(local, size)]
			return r, r.skipTo(t.column)
		default:
			return nil, fmt.Errorf("%w: page %d is of type %d", errCorrupt, next, page[0])
		}
	}
}

// pageReader reads a record: what lies on its B-tree page, then a chain of
// overflow pages.
type pageReader struct {
	db     *sql.DB
	usable int
	rest   []byte
	next   int64 // overflow page
	left   int64 // of the record, with rest
}

func (r *pageReader) page(n int64) (page []byte, err error) {
	err = r.db.QueryRow("SELECT data FROM sqlite_dbpage WHERE pgno = ?", n).Scan(&page)
	if err == nil && len(page) < 512 {
		err = fmt.Errorf("%w: page %d is missing", errCorrupt, n)
	}
	return page, err
}

func (r *pageReader) Read(p []byte) (int, error) {
	if r.left == 0 {
		return 0, io.EOF
	}
	if len(r.rest) == 0 {
		page, err := r.page(r.next)
		if err != nil {
			return 0, err
		}
		r.next, r.rest = int64(binary.BigEndian.Uint32(page)), page[4:r.usable]
	}
	n := copy(p, r.rest[:min(int64(len(r.rest)), r.left)])
	r.rest, r.left = r.rest[n:], r.left-int64(n)
	return n, nil
}

// skipTo leaves of the record only its column.
func (r *pageReader) skipTo(column int) error {
	header, n := varint(r.rest)
	var before int64
	for i := n; i < int(header); i += n {
		var serial, size int64
		serial, n = varint(r.rest[i:])
		if size = serial; serial >= 12 {
			size = (serial - 12) / 2
		} else {
			size = []int64{0, 1, 2, 3, 4, 6, 8, 8, 0, 0, 0, 0}[serial]
		}
		if column--; column < 0 {
			_, err := io.CopyN(io.Discard, r, header+before)
			r.left = size
			return err
		}
		before += size
	}
	return fmt.Errorf("%w: a record has too few columns", errCorrupt)
}

// varint decodes SQLite's integers of up to nine bytes, the most significant
// first, and returns how many bytes they took.
func varint(p []byte) (v int64, n int) {
	for n < 8 && p[n] >= 0x80 {
		v = v<<7 | int64(p[n]&0x7f)
		n++
	}
	if n == 8 {
		return v<<8 | int64(p[8]), 9
	}
	return v<<7 | int64(p[n]), n + 1
}
