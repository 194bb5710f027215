-- Fills an in-memory database and prints its checksum at the end.
CREATE TABLE item (id INTEGER PRIMARY KEY, name TEXT NOT NULL, weight INTEGER NOT NULL);
WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < :rows)
INSERT INTO item SELECT i, printf('item-%08x', i * 2654435761 % 4294967296), i * i % 10007 FROM n;
CREATE INDEX item_name ON item (name);
UPDATE item SET weight = weight + length(name) WHERE id % 3 = 0;
DELETE FROM item WHERE weight % 5 = 0;
SELECT count(*), sum(weight), max(name) FROM item;
.sha3sum
