
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

CREATE UNIQUE INDEX routes_by_route ON routes (route);

CREATE TABLE deploys (
    id             INTEGER PRIMARY KEY,
    app            TEXT NOT NULL REFERENCES apps (name) ON DELETE CASCADE,
    release        TEXT NOT NULL CHECK (length(release) BETWEEN 1 AND 128),
    deployed_at_ms INTEGER NOT NULL CHECK (deployed_at_ms >= 0)
) STRICT;

CREATE INDEX deploys_by_app ON deploys (app, id);

CREATE TABLE pending_rollouts (
    app           TEXT PRIMARY KEY CHECK (length(app) BETWEEN 1 AND 63),
    release       TEXT NOT NULL CHECK (length(release) BETWEEN 1 AND 128),
    path          TEXT NOT NULL CHECK (substr(path, 1, 1) = '/'),
    secrets_hash  TEXT NOT NULL,
    started_at_ms INTEGER NOT NULL CHECK (started_at_ms >= 0)
) STRICT;

CREATE TABLE uids (
    app TEXT PRIMARY KEY CHECK (length(app) BETWEEN 1 AND 63),
    uid INTEGER NOT NULL UNIQUE CHECK (uid BETWEEN 1 AND 4294967295)
) STRICT;

CREATE TABLE ports (
    app   TEXT PRIMARY KEY CHECK (length(app) BETWEEN 1 AND 63),
    base  INTEGER NOT NULL UNIQUE CHECK (base BETWEEN 1 AND 65535),
    width INTEGER NOT NULL CHECK (width >= 1 AND base + width <= 65536)
) STRICT;

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

INSERT INTO schema_changes VALUES (10, 'runtime_state', 1772366400000, '0.1.0');
INSERT INTO apps VALUES ('blog', 'v1', '/opt/tako/apps/blog/releases/v1', 2, 90000, 20000, 70000, 0, 'h1', 1772366400000, '');
INSERT INTO routes VALUES ('blog', 0, 'z.example.com'), ('blog', 1, 'a.example.com/x/*');
INSERT INTO deploys VALUES (1, 'blog', 'v1', 1772366400000);
INSERT INTO uids VALUES ('blog', 70000);
INSERT INTO ports VALUES ('blog', 20000, 8);
PRAGMA application_id = 1952541551;
PRAGMA user_version = 10;
