/*
 * otherworld_memory: a daemon plugin for MariaDB that takes MEMORY tables through the death of the kernel.
 *
 * Its crash procedure writes the rows of every MEMORY table to the data directory as raw records with checksums, and has the server begin anew. The new
 * server reads them back before it serves anybody: its init file says `SET GLOBAL otherworld_memory_load = ON` (see README.md).
 *
 * C++ only because the server's headers are. It refuses a server that it was not built for.
 */
#define MYSQL_SERVER 1
#include <my_global.h>
#include <sql_class.h>
#include <sql_base.h>
#include <sql_table.h>
#include <transaction.h>
#include <mysqld.h>
#include <log.h>
#include <mysql/plugin.h>
#include <mysql/service_sql.h>
#include <service_versions.h>
#include <heapdef.h>
#include <otherworld.h>

#include <errno.h>
#include <fcntl.h>
#include <link.h>
#include <semaphore.h>
#include <stddef.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

/* The version of Debian's package that it is built for: a constant of the build. */
static const char BUILT_FOR[]= OTHERWORLD_SERVER_VERSION;
static const char DUMP[]= "otherworld-memory.dump";
static const char PART[]= "otherworld-memory.part";
static const char BROKEN[]= "otherworld-memory.broken";
static const char REHEARSAL[]= "otherworld-memory.rehearsal";
static const char ANCHOR[]= "otherworld_memory_anchor";
static const char MAGIC[16]= "otherworld-heap";

extern mysql_mutex_t THR_LOCK_heap;

/* The version that is asked for; the server puts its functions there when it loads the plugin. */
extern "C"
{
struct sql_service_st *sql_service= (struct sql_service_st *) VERSION_sql_service;
}

/* ---- the file */

struct file_header
{
  char magic[16];
  char server[SERVER_VERSION_LENGTH + 4];
  uint64_t tables;
};

struct table_header
{
  char name[FN_REFLEN]; /* as the engine names it: ./database/table */
  uint64_t reclength, records, auto_increment, max_table_size;
  uint64_t was_locked; /* a statement was changing it when the kernel died; it was finished before this was written */
};

/* Ends the file; `records` of all tables. */
struct file_end
{
  char magic[16];
  uint64_t records;
};

static const uint64_t CHECKSUM_BEGIN= 0;

/* CRC-32C, of what comes in parts of any size: against accidents. */
static uint64_t checksum(uint64_t sum, const void *bytes, size_t len)
{
  return my_crc32c((uint32) sum, bytes, len);
}

/* ---- writing: system calls and static memory only, for everything else may stand still */

static LIST **share_list; /* the engine's `heap_share_list` */
static struct
{
  int fd;
  bool failed;
  size_t used;
  uint64_t sum;
  uchar bytes[1 << 20];
} out;

static void flush_out()
{
  size_t done= 0;
  while (!out.failed && done < out.used)
  {
    ssize_t n= write(out.fd, out.bytes + done, out.used - done);
    if (n > 0)
      done+= n;
    else if (n < 0 && errno != EINTR)
      out.failed= true;
  }
  out.used= 0;
}

static void put(const void *data, size_t len)
{
  const uchar *from= (const uchar *) data;
  out.sum= checksum(out.sum, data, len);
  while (len)
  {
    size_t part= MY_MIN(len, sizeof out.bytes - out.used);
    memcpy(out.bytes + out.used, from, part);
    out.used+= part;
    from+= part;
    len-= part;
    if (out.used == sizeof out.bytes)
      flush_out();
  }
}

/* The sum so far; what follows has its own. */
static void put_sum()
{
  uint64_t sum= out.sum;
  put(&sum, sizeof sum);
  out.sum= CHECKSUM_BEGIN;
}

/* Tables of the data directory: no temporary ones, which go with their connections. */
static bool is_meant(const HP_SHARE *share)
{
  return share->name && !strncmp(share->name, "./", 2) && !strstr(share->name, "/#sql") && strlen(share->name) < FN_REFLEN;
}

static HP_SHARE *share_of(const LIST *element) { return (HP_SHARE *) element->data; }

/* The record at a position of the tree of blocks. */
static const uchar *record_at(const HP_BLOCK *block, ulong position)
{
  const HP_PTRS *ptr= block->root;
  for (int level= block->levels - 1; level > 0; level--)
  {
    ptr= (const HP_PTRS *) ptr->blocks[position / block->level_info[level].records_under_level];
    position%= block->level_info[level].records_under_level;
  }
  return (const uchar *) ptr + position * block->recbuffer;
}

/* Whether a name is among these: one after the other, each with its NUL. */
static bool is_in(const char *names, size_t len, const char *name)
{
  for (size_t at= 0; at < len; at+= strlen(names + at) + 1)
    if (!strcmp(names + at, name))
      return true;
  return false;
}

static char locked_names[1 << 16];
static size_t locked_len;

static bool put_table(const HP_SHARE *share, uint64_t *all)
{
  static table_header header;
  memset(&header, 0, sizeof header);
  strcpy(header.name, share->name);
  header.reclength= share->reclength;
  header.records= share->records;
  header.auto_increment= share->auto_increment;
  header.max_table_size= share->max_table_size;
  header.was_locked= is_in(locked_names, locked_len, share->name);
  put(&header, sizeof header);
  ulong found= 0, end= share->records + share->deleted;
  for (ulong position= 0; position < end && found <= share->records; position++)
  {
    const uchar *record= record_at(&share->block, position);
    if (!record[share->visible])
      continue;
    put(record, share->reclength);
    found++;
  }
  put_sum();
  *all+= found;
  return found == share->records;
}

/* Writes all tables; a file of this name is there only if it is whole. */
static bool dump(const char *name)
{
  out.fd= open(PART, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
  if (out.fd < 0)
    return false;
  out.used= 0;
  out.failed= false;
  out.sum= CHECKSUM_BEGIN;
  file_header header;
  memset(&header, 0, sizeof header);
  memcpy(header.magic, MAGIC, sizeof MAGIC);
  strncpy(header.server, server_version, SERVER_VERSION_LENGTH);
  for (LIST *element= *share_list; element; element= element->next)
    header.tables+= is_meant(share_of(element));
  put(&header, sizeof header);
  put_sum();
  bool whole= true;
  file_end end;
  memset(&end, 0, sizeof end);
  memcpy(end.magic, MAGIC, sizeof MAGIC);
  for (LIST *element= *share_list; element; element= element->next)
    if (is_meant(share_of(element)))
      whole&= put_table(share_of(element), &end.records);
  put(&end, sizeof end);
  put_sum();
  flush_out();
  whole&= !out.failed && !fsync(out.fd);
  whole&= !close(out.fd);
  return whole && !rename(PART, name);
}

/* ---- the crash procedure */

static sem_t wake;
static char exe[FN_REFLEN];
static char arguments[1 << 16];
static char *argv[1024];

/* Descriptors do not go over to the new server. */
static void close_all_at_exec()
{
#ifndef CLOSE_RANGE_CLOEXEC
#define CLOSE_RANGE_CLOEXEC (1U << 2)
#endif
  syscall(SYS_close_range, 3U, ~0U, CLOSE_RANGE_CLOEXEC);
}

static otherworld_outcome procedure(const otherworld_context *, void *)
{
  /* Somebody is adding or removing a table, or changing one: that is finished first, and our thread does the rest. */
  bool busy= otherworld_mutex_owner(&THR_LOCK_heap.m_mutex) != 0;
  locked_len= 0;
  for (LIST *element= busy ? NULL : *share_list; element; element= element->next)
  {
    const HP_SHARE *share= share_of(element);
    if (!is_meant(share) || !share->lock.write.data)
      continue;
    busy= true;
    size_t len= strlen(share->name) + 1;
    if (locked_len + len <= sizeof locked_names)
    {
      memcpy(locked_names + locked_len, share->name, len);
      locked_len+= len;
    }
  }
  if (busy || !dump(DUMP))
  {
    sem_post(&wake);
    return OTHERWORLD_CONTINUE;
  }
  close_all_at_exec();
  return OTHERWORLD_RESTART;
}

static bool query(MYSQL *connection, const char *text)
{
  if (!mysql_real_query(connection, text, strlen(text)))
    return true;
  sql_print_error("otherworld_memory: %s: %s", text, mysql_error(connection));
  return false;
}

/* Waits for the statements in flight, holds all others off and writes the tables; if it is not a rehearsal, the server begins anew then. If anything
   fails the server goes on as it is: nothing is lost. */
static void write_in_peace(const char *name, bool rehearsal)
{
  MYSQL *connection= mysql_init(NULL);
  if (connection && mysql_real_connect_local(connection) && query(connection, "SET SESSION lock_wait_timeout = 30") &&
      query(connection, "FLUSH TABLES WITH READ LOCK"))
  {
    mysql_mutex_lock(&THR_LOCK_heap);
    bool whole= dump(name);
    mysql_mutex_unlock(&THR_LOCK_heap);
    if (whole && !rehearsal)
    {
      close_all_at_exec();
      execve(exe, argv, environ);
    }
    if (!whole || !rehearsal)
      sql_print_error("otherworld_memory: the MEMORY tables could not be written (errno %d); the server goes on without a restart", errno);
    query(connection, "UNLOCK TABLES");
  }
  if (connection)
    mysql_close(connection);
}

/* Sleeps until the procedure wakes it, in the server that goes on, and does what the procedure could not. */
static void *finish(void *)
{
  while (sem_wait(&wake))
    ;
  my_thread_init();
  write_in_peace(DUMP, false);
  my_thread_end();
  return NULL;
}

static void *rehearse(void *)
{
  my_thread_init();
  write_in_peace(REHEARSAL, true);
  my_thread_end();
  return NULL;
}

/* ---- reading */

struct input
{
  const uchar *at, *end;
  uint64_t sum;
};

static const uchar *take(input *in, size_t len)
{
  if ((size_t) (in->end - in->at) < len)
    return NULL;
  const uchar *data= in->at;
  in->sum= checksum(in->sum, data, len);
  in->at+= len;
  return data;
}

static bool sum_is_right(input *in)
{
  uint64_t expected= in->sum, found;
  const uchar *data= take(in, sizeof found);
  if (!data)
    return false;
  memcpy(&found, data, sizeof found);
  in->sum= CHECKSUM_BEGIN;
  return found == expected;
}

/* Goes through a dump; `table` is called for each table once its checksum is known to be right. NULL if it is whole, or what is wrong. */
static const char *walk(const uchar *bytes, size_t len, bool (*table)(THD *, const table_header *, const uchar *), THD *thd)
{
  input in= { bytes, bytes + len, CHECKSUM_BEGIN };
  const file_header *header= (const file_header *) take(&in, sizeof *header);
  if (!header || memcmp(header->magic, MAGIC, sizeof MAGIC) || !sum_is_right(&in))
    return "it is not a whole dump";
  if (strncmp(header->server, server_version, SERVER_VERSION_LENGTH))
    return "another version of the server has written it";
  uint64_t all= 0;
  for (uint64_t n= 0; n < header->tables; n++)
  {
    table_header about;
    const uchar *data= take(&in, sizeof about);
    if (!data)
      return "it ends too early";
    memcpy(&about, data, sizeof about);
    if (about.name[sizeof about.name - 1] || !about.reclength || about.records > (size_t) (in.end - in.at) / about.reclength)
      return "it is damaged";
    const uchar *records= take(&in, about.records * about.reclength);
    if (!records || !sum_is_right(&in))
      return "a checksum is wrong";
    all+= about.records;
    if (table && !table(thd, &about, records))
      return "a table could not be filled";
  }
  file_end end;
  const uchar *data= take(&in, sizeof end);
  if (!data)
    return "it ends too early";
  memcpy(&end, data, sizeof end);
  if (memcmp(end.magic, MAGIC, sizeof MAGIC) || end.records != all || !sum_is_right(&in) || in.at != in.end)
    return "it is damaged";
  return NULL;
}

static HP_SHARE *share_of(THD *thd, TABLE *table)
{
  THR_LOCK_DATA *data[2]= { NULL, NULL };
  table->file->store_lock(thd, data, TL_IGNORE);
  return data[0] ? (HP_SHARE *) ((char *) data[0]->lock - offsetof(HP_SHARE, lock)) : NULL;
}

static bool fill(THD *thd, const table_header *about, const uchar *records)
{
  char path[FN_REFLEN], database[NAME_LEN * 2 + 1], name[NAME_LEN * 2 + 1];
  strcpy(path, about->name + 2);
  char *slash= strchr(path, '/');
  if (!slash)
    return false;
  *slash= 0;
  LEX_CSTRING db= { database, filename_to_tablename(path, database, sizeof database) };
  LEX_CSTRING table_name= { name, filename_to_tablename(slash + 1, name, sizeof name) };
  /* As large as it was allowed to be when it was made. */
  ulonglong limit= thd->variables.max_heap_table_size;
  thd->variables.max_heap_table_size= MY_MAX(limit, about->max_table_size);
  TABLE_LIST list;
  list.init_one_table(&db, &table_name, NULL, TL_WRITE);
  const char *trouble= NULL;
  if (open_and_lock_tables(thd, &list, FALSE, MYSQL_OPEN_IGNORE_GLOBAL_READ_LOCK))
    trouble= "it cannot be opened";
  else
  {
    TABLE *table= list.table;
    if (table->file->ht != heap_hton || table->s->reclength != about->reclength)
      trouble= "it is another table now";
    else if (table->file->stats.records || share_of(thd, table)->records)
      trouble= "it is not empty";
    table->use_all_columns();
    for (uint64_t n= 0; !trouble && n < about->records; n++)
    {
      memcpy(table->record[0], records + n * about->reclength, about->reclength);
      if (table->file->ha_write_row(table->record[0]))
        trouble= "a row cannot be written";
    }
    if (!trouble && table->found_next_number_field)
      table->file->ha_reset_auto_increment(about->auto_increment);
  }
  trans_commit_stmt(thd);
  close_thread_tables(thd);
  thd->release_transactional_locks();
  thd->variables.max_heap_table_size= limit;
  if (trouble)
    sql_print_error("otherworld_memory: %s.%s is not as it was: %s", database, name, trouble);
  else
    sql_print_information("otherworld_memory: %s.%s has its %llu rows again%s", database, name, (ulonglong) about->records,
                          about->was_locked ? "; it was locked at the crash, and its statement was finished before" : "");
  return !trouble;
}

static void load(THD *thd)
{
  if (!access(PART, F_OK))
  {
    sql_print_error("otherworld_memory: %s was not written to its end and is not used; kept as %s", PART, BROKEN);
    rename(PART, BROKEN);
  }
  int fd= open(DUMP, O_RDONLY | O_CLOEXEC);
  if (fd < 0)
    return;
  struct stat stat;
  const uchar *bytes= NULL;
  if (!fstat(fd, &stat) && stat.st_size > 0)
    bytes= (const uchar *) mmap(NULL, stat.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
  close(fd);
  const char *trouble= "it cannot be read";
  if (bytes && bytes != MAP_FAILED)
  {
    ulonglong options= thd->variables.option_bits;
    thd->variables.option_bits&= ~OPTION_BIN_LOG;
    /* Nothing is loaded of what is not whole. */
    trouble= walk(bytes, stat.st_size, NULL, thd);
    if (!trouble)
      trouble= walk(bytes, stat.st_size, fill, thd);
    thd->variables.option_bits= options;
    munmap((void *) bytes, stat.st_size);
  }
  /* Never a second time. */
  if (!trouble)
    unlink(DUMP);
  else
  {
    sql_print_error("otherworld_memory: %s: %s; kept as %s", DUMP, trouble, BROKEN);
    rename(DUMP, BROKEN);
  }
}

/* ---- finding the engine's list: it is not exported, but whoever has just made a table knows what it holds */

struct search
{
  const void *wanted;
  LIST **found;
  unsigned count;
};

static int look_into(struct dl_phdr_info *info, size_t, void *data)
{
  search *what= (search *) data;
  for (int n= 0; n < info->dlpi_phnum; n++)
  {
    const ElfW(Phdr) *segment= info->dlpi_phdr + n;
    if (segment->p_type != PT_LOAD || !(segment->p_flags & PF_W))
      continue;
    void **word= (void **) (((size_t) (info->dlpi_addr + segment->p_vaddr) + 7) & ~(size_t) 7);
    for (size_t left= segment->p_memsz / sizeof *word; left > 1; left--, word++)
      if (*word == what->wanted)
      {
        what->found= (LIST **) word;
        what->count++;
      }
  }
  return 1; /* the program itself comes first, and nothing else is of interest */
}

/* `table` was made last: the list begins with it. */
static LIST **find_share_list(THD *thd, TABLE *table)
{
  HP_SHARE *share= table->file->ht == heap_hton ? share_of(thd, table) : NULL;
  if (!share || share->open_list.data != share)
    return NULL;
  search what= { &share->open_list, NULL, 0 };
  dl_iterate_phdr(look_into, &what);
  return what.count == 1 ? what.found : NULL;
}

/* ---- the plugin */

static my_bool load_value;

static void update_load(MYSQL_THD thd, struct st_mysql_sys_var *, void *value, const void *save)
{
  *(my_bool *) value= *(const my_bool *) save;
  if (!load_value || share_list)
    return;
  TABLE *anchor= thd->find_temporary_table("mysql", ANCHOR, THD::TMP_TABLE_ANY);
  share_list= anchor ? find_share_list(thd, anchor) : NULL;
  if (!share_list)
    sql_print_error("otherworld_memory: the list of MEMORY tables was not found (did the init file make mysql.%s just before?): no crash "
                    "procedure", ANCHOR);
  load(thd);
  if (!share_list)
    return;
  otherworld_options options= {};
  options.time_limit_ms= 120000;
  if (int error= otherworld_register(procedure, NULL, &options))
    sql_print_error("otherworld_memory: no crash procedure: errno %d", error);
  else
    sql_print_information("otherworld_memory: ready");
}

static MYSQL_SYSVAR_BOOL(load, load_value, PLUGIN_VAR_NOCMDARG | PLUGIN_VAR_NOCMDOPT,
                         "Set once, in the init file: reads the MEMORY tables back that a crash procedure has written, and registers one", NULL,
                         update_load, 0);

static my_bool rehearse_value;

static void update_rehearse(MYSQL_THD, struct st_mysql_sys_var *, void *, const void *save)
{
  pthread_t thread;
  /* A statement of its own connection; it does not wait for this one. */
  if (*(const my_bool *) save && share_list && !pthread_create(&thread, NULL, rehearse, NULL))
    pthread_detach(thread);
}

static MYSQL_SYSVAR_BOOL(rehearse, rehearse_value, PLUGIN_VAR_NOCMDARG | PLUGIN_VAR_NOCMDOPT,
                         "When set: writes all MEMORY tables as after a crash, to otherworld-memory.rehearsal in the data directory", NULL,
                         update_rehearse, 0);
static struct st_mysql_sys_var *variables[]= { MYSQL_SYSVAR(load), MYSQL_SYSVAR(rehearse), NULL };

/* What a restart needs, taken while there is time. */
static bool remember_arguments()
{
  ssize_t len= readlink("/proc/self/exe", exe, sizeof exe - 1);
  int fd= open("/proc/self/cmdline", O_RDONLY | O_CLOEXEC);
  ssize_t used= fd < 0 ? -1 : read(fd, arguments, sizeof arguments - 1);
  if (fd >= 0)
    close(fd);
  if (len < 0 || used <= 0)
    return false;
  size_t count= 0;
  for (ssize_t at= 0; at < used && count < array_elements(argv) - 1; at+= strlen(arguments + at) + 1)
    argv[count++]= arguments + at;
  return true;
}

static int init(void *)
{
  if (strcmp(server_version, BUILT_FOR))
  {
    sql_print_error("otherworld_memory: built for MariaDB %s, and this is %s: it depends on the server's inner structures; build it for this version",
                    BUILT_FOR, server_version);
    return 1;
  }
  pthread_t thread;
  if (!remember_arguments() || sem_init(&wake, 0, 0) || pthread_create(&thread, NULL, finish, NULL))
    return 1;
  pthread_detach(thread);
  return 0;
}

static int deinit(void *)
{
  otherworld_unregister();
  return 0;
}

static struct st_mysql_daemon info= { MYSQL_DAEMON_INTERFACE_VERSION };

maria_declare_plugin(otherworld_memory)
{
  MYSQL_DAEMON_PLUGIN,
  &info,
  "otherworld_memory",
  "the Otherworld project",
  "Takes MEMORY tables through the death of the kernel",
  PLUGIN_LICENSE_GPL,
  init,
  deinit,
  0x0100,
  NULL,
  variables,
  "1.0",
  MariaDB_PLUGIN_MATURITY_EXPERIMENTAL
}
maria_declare_plugin_end;
