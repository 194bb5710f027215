-- The init file of a server with the plugin otherworld_memory. The first line makes a table by which the plugin finds the engine's list of tables.
CREATE TEMPORARY TABLE mysql.otherworld_memory_anchor (a INT) ENGINE=MEMORY;
SET GLOBAL otherworld_memory_load = ON;
