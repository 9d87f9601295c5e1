-- The first schema of our own. 1 and 2 were the numbers of tako-server.
PRAGMA application_id = 1952541551; -- "tako"

CREATE TABLE schema_changes (
    version       INTEGER PRIMARY KEY,
    name          TEXT NOT NULL,
    applied_at_ms INTEGER NOT NULL,
    applied_by    TEXT NOT NULL
) STRICT;

CREATE TABLE apps (
    name             TEXT PRIMARY KEY CHECK (length(name) BETWEEN 1 AND 63),
    release          TEXT NOT NULL CHECK (length(release) BETWEEN 1 AND 128),
    path             TEXT NOT NULL CHECK (substr(path, 1, 1) = '/'),
    instances        INTEGER NOT NULL CHECK (instances BETWEEN 0 AND 255),
    idle_timeout_ms  INTEGER NOT NULL CHECK (idle_timeout_ms >= 0),
    base_port        INTEGER NOT NULL CHECK (base_port BETWEEN 0 AND 65535),
    uid              INTEGER NOT NULL CHECK (uid BETWEEN 0 AND 4294967295),
    stopped          INTEGER NOT NULL CHECK (stopped IN (0, 1)),
    secrets_hash     TEXT NOT NULL,
    deployed_at_ms   INTEGER NOT NULL CHECK (deployed_at_ms >= 0),
    previous_release TEXT NOT NULL CHECK (length(previous_release) <= 128)
) STRICT;

CREATE TABLE routes (
    app      TEXT NOT NULL REFERENCES apps (name) ON DELETE CASCADE,
    position INTEGER NOT NULL CHECK (position >= 0),
    route    TEXT NOT NULL CHECK (route <> ''),
    PRIMARY KEY (app, position)
) STRICT;

-- A route belongs to one app of the whole server.
CREATE UNIQUE INDEX routes_by_route ON routes (route);

CREATE TABLE deploys (
    id             INTEGER PRIMARY KEY,
    app            TEXT NOT NULL REFERENCES apps (name) ON DELETE CASCADE,
    release        TEXT NOT NULL CHECK (length(release) BETWEEN 1 AND 128),
    deployed_at_ms INTEGER NOT NULL CHECK (deployed_at_ms >= 0)
) STRICT;

CREATE INDEX deploys_by_app ON deploys (app, id);

-- A rollout that has begun and is neither committed nor given up. Its app need
-- not exist yet.
CREATE TABLE pending_rollouts (
    app           TEXT PRIMARY KEY CHECK (length(app) BETWEEN 1 AND 63),
    release       TEXT NOT NULL CHECK (length(release) BETWEEN 1 AND 128),
    path          TEXT NOT NULL CHECK (substr(path, 1, 1) = '/'),
    secrets_hash  TEXT NOT NULL,
    started_at_ms INTEGER NOT NULL CHECK (started_at_ms >= 0)
) STRICT;

-- Rows outlive their apps: the files of a deleted app may still belong to the
-- uid.
CREATE TABLE uids (
    app TEXT PRIMARY KEY CHECK (length(app) BETWEEN 1 AND 63),
    uid INTEGER NOT NULL UNIQUE CHECK (uid BETWEEN 1 AND 4294967295)
) STRICT;

CREATE TABLE ports (
    app   TEXT PRIMARY KEY CHECK (length(app) BETWEEN 1 AND 63),
    base  INTEGER NOT NULL UNIQUE CHECK (base BETWEEN 1 AND 65535),
    width INTEGER NOT NULL CHECK (width >= 1 AND base + width <= 65536)
) STRICT;

-- The server is upgrading exactly while the row is there.
CREATE TABLE upgrade_lock (
    id             INTEGER PRIMARY KEY CHECK (id = 1),
    owner          TEXT NOT NULL CHECK (owner <> ''),
    acquired_at_ms INTEGER NOT NULL,
    renewed_at_ms  INTEGER NOT NULL
) STRICT;

CREATE TABLE server_values (
    key   TEXT PRIMARY KEY CHECK (key <> ''),
    value BLOB NOT NULL CHECK (length(value) <= 65536)
) STRICT;
