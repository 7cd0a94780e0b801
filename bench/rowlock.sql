-- The design that most would write on PostgreSQL, for pgbench: each transfer is a database
-- transaction that locks its two rows in ascending order, moves the money, and writes the
-- transfer and its two entries. `hot` is 1 where every transfer goes through one account, else 0.
\set first random(1, 1000)
\set second random(1, 1000)
\set low case when :hot = 1 then 1 when :first < :second then :first else :second end
\set high case when :hot = 1 then 1 + :second when :first < :second then :second else :first + 1 end
BEGIN;
SELECT id, balance FROM rowlock_account WHERE id IN (:low, :high) ORDER BY id FOR UPDATE;
INSERT INTO rowlock_transfer (source_id, dest_id, amount) VALUES (:low, :high, 1);
UPDATE rowlock_account SET balance = balance - 1, last_seq = last_seq + 1 WHERE id = :low;
INSERT INTO rowlock_entry (account_id, seq, transfer_id, type, amount, balance)
    SELECT id, last_seq, currval('rowlock_transfer_id_seq'), 'DEBIT', 1, balance
    FROM rowlock_account WHERE id = :low;
UPDATE rowlock_account SET balance = balance + 1, last_seq = last_seq + 1 WHERE id = :high;
INSERT INTO rowlock_entry (account_id, seq, transfer_id, type, amount, balance)
    SELECT id, last_seq, currval('rowlock_transfer_id_seq'), 'CREDIT', 1, balance
    FROM rowlock_account WHERE id = :high;
COMMIT;
