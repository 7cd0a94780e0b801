-- A ledger as the first version of the schema wrote it.
BEGIN TRANSACTION;
CREATE TABLE account (
	id TEXT NOT NULL, 
	name TEXT, 
	owner_name TEXT NOT NULL, 
	asset TEXT NOT NULL, 
	kind TEXT NOT NULL, 
	status TEXT NOT NULL, 
	balance INTEGER NOT NULL, 
	last_seq INTEGER NOT NULL, 
	created_at INTEGER NOT NULL, 
	told_at INTEGER, 
	PRIMARY KEY (id), 
	UNIQUE (name, asset), 
	CHECK (kind IN ('CUSTOMER', 'SYSTEM')), 
	CHECK (status IN ('ACTIVE', 'FROZEN', 'CLOSED')), 
	CHECK (balance >= 0 OR kind = 'SYSTEM'), 
	CHECK (balance = 0 OR status <> 'CLOSED'), 
	CHECK (last_seq > 0 OR (last_seq = 0 AND balance = 0)), 
	FOREIGN KEY(asset) REFERENCES asset (code)
)
 STRICT

;
INSERT INTO "account" VALUES('01a1fc0e-8788-75fb-bb05-7824dbd5def8','merchants','system','USD','SYSTEM','ACTIVE',0,0,1795230173064374,NULL);
INSERT INTO "account" VALUES('01a1fc0e-8788-75fc-bb05-7824dbd5def8','cash','system','EUR','SYSTEM','ACTIVE',0,0,1795230173064374,NULL);
INSERT INTO "account" VALUES('01a1fc0e-8788-75fd-bb05-7824dbd5def8','treasury','system','DMND','SYSTEM','ACTIVE',-800000,2,1795230173064374,NULL);
INSERT INTO "account" VALUES('01a1fc0e-8788-75fe-bb05-7824dbd5def8','cashback','system','GBP','SYSTEM','ACTIVE',0,0,1795230173064374,NULL);
INSERT INTO "account" VALUES('01a1fc0e-8788-75ff-bb05-7824dbd5def8','cashback','system','JPY','SYSTEM','ACTIVE',0,0,1795230173064374,NULL);
INSERT INTO "account" VALUES('01a1fc0e-8788-7600-bb05-7824dbd5def8','cashback','system','USD','SYSTEM','ACTIVE',0,0,1795230173064374,NULL);
INSERT INTO "account" VALUES('01a1fc0e-8788-7601-bb05-7824dbd5def8','cash','system','GBP','SYSTEM','ACTIVE',0,0,1795230173064374,NULL);
INSERT INTO "account" VALUES('01a1fc0e-8788-7602-bb05-7824dbd5def8','cash','system','JPY','SYSTEM','ACTIVE',0,0,1795230173064374,NULL);
INSERT INTO "account" VALUES('01a1fc0e-8788-7603-bb05-7824dbd5def8','cash','system','USD','SYSTEM','ACTIVE',-1188944,7,1795230173064374,NULL);
INSERT INTO "account" VALUES('01a1fc0e-8788-7604-bb05-7824dbd5def8','treasury','system','GOLD','SYSTEM','ACTIVE',-1800000,2,1795230173064374,NULL);
INSERT INTO "account" VALUES('01a1fc0e-8788-7605-bb05-7824dbd5def8','treasury','system','PTS','SYSTEM','ACTIVE',-7000000,2,1795230173064374,NULL);
INSERT INTO "account" VALUES('01a1fc0e-8788-7606-bb05-7824dbd5def8','payments','system','USD','SYSTEM','ACTIVE',100,1,1795230173064374,NULL);
INSERT INTO "account" VALUES('01a1fc0e-8788-7607-bb05-7824dbd5def8','merchants','system','EUR','SYSTEM','ACTIVE',0,0,1795230173064374,NULL);
INSERT INTO "account" VALUES('01a1fc0e-8788-7608-bb05-7824dbd5def8','cashback','system','EUR','SYSTEM','ACTIVE',0,0,1795230173064374,NULL);
INSERT INTO "account" VALUES('01a1fc0e-8788-7609-bb05-7824dbd5def8','merchants','system','GBP','SYSTEM','ACTIVE',0,0,1795230173064374,NULL);
INSERT INTO "account" VALUES('01a1fc0e-8788-760a-bb05-7824dbd5def8','merchants','system','JPY','SYSTEM','ACTIVE',0,0,1795230173064374,NULL);
INSERT INTO "account" VALUES('01a1fc0e-8796-7ae1-a132-30e85ef68e01','wallets:user_alice','user_alice','GOLD','CUSTOMER','ACTIVE',1000000,1,1795230173078680,NULL);
INSERT INTO "account" VALUES('01a1fc0e-8796-7ae2-a132-30e85ef68e01','wallets:user_alice','user_alice','DMND','CUSTOMER','ACTIVE',500000,1,1795230173078680,NULL);
INSERT INTO "account" VALUES('01a1fc0e-8796-7ae3-a132-30e85ef68e01','wallets:user_alice','user_alice','PTS','CUSTOMER','ACTIVE',5000000,1,1795230173078680,NULL);
INSERT INTO "account" VALUES('01a1fc0e-8796-7aec-a132-30e85ef68e01','wallets:user_bob','user_bob','GOLD','CUSTOMER','ACTIVE',800000,1,1795230173078680,NULL);
INSERT INTO "account" VALUES('01a1fc0e-8796-7aed-a132-30e85ef68e01','wallets:user_bob','user_bob','DMND','CUSTOMER','ACTIVE',300000,1,1795230173078680,NULL);
INSERT INTO "account" VALUES('01a1fc0e-8796-7aee-a132-30e85ef68e01','wallets:user_bob','user_bob','PTS','CUSTOMER','ACTIVE',2000000,1,1795230173078680,NULL);
INSERT INTO "account" VALUES('01a1fc0e-8796-7af7-a132-30e85ef68e01','atm:1001','1001','USD','CUSTOMER','ACTIVE',100000,1,1795230173078680,NULL);
INSERT INTO "account" VALUES('01a1fc0e-8796-7afc-a132-30e85ef68e01','atm:1002','1002','USD','CUSTOMER','ACTIVE',25050,1,1795230173078680,NULL);
INSERT INTO "account" VALUES('01a1fc0e-8796-7b01-a132-30e85ef68e01','atm:1003','1003','USD','CUSTOMER','ACTIVE',0,0,1795230173078680,NULL);
INSERT INTO "account" VALUES('01a1fc0e-8796-7b03-a132-30e85ef68e01','atm:1004','1004','USD','CUSTOMER','ACTIVE',50000,1,1795230173078680,NULL);
INSERT INTO "account" VALUES('01a1fc0e-8796-7b08-a132-30e85ef68e01','atm:1005','1005','USD','CUSTOMER','ACTIVE',12345,1,1795230173078680,NULL);
INSERT INTO "account" VALUES('01a1fc0e-8796-7b0d-a132-30e85ef68e01','atm:1006','1006','USD','CUSTOMER','ACTIVE',999999,1,1795230173078680,NULL);
INSERT INTO "account" VALUES('01a1fc0e-8d37-7a08-a132-30e85ef68e01',NULL,'Alice','USD','CUSTOMER','ACTIVE',750,2,1795230174519627,NULL);
INSERT INTO "account" VALUES('01a1fc0e-8d44-7cb4-a132-30e85ef68e01',NULL,'Bob','USD','CUSTOMER','ACTIVE',300,1,1795230174532794,NULL);
INSERT INTO "account" VALUES('01a1fc0e-8d65-769f-a132-30e85ef68e01','bank:a1','a1','USD','CUSTOMER','ACTIVE',400,2,1795230174565414,1000);
CREATE TABLE asset (
	code TEXT NOT NULL, 
	name TEXT NOT NULL, 
	exponent INTEGER NOT NULL, 
	closed_loop INTEGER NOT NULL, 
	PRIMARY KEY (code)
)
 STRICT

;
INSERT INTO "asset" VALUES('USD','US Dollar',2,0);
INSERT INTO "asset" VALUES('EUR','Euro',2,0);
INSERT INTO "asset" VALUES('GBP','Pound Sterling',2,0);
INSERT INTO "asset" VALUES('JPY','Yen',0,0);
INSERT INTO "asset" VALUES('GOLD','Gold Coins',4,1);
INSERT INTO "asset" VALUES('DMND','Diamonds',4,1);
INSERT INTO "asset" VALUES('PTS','Loyalty Points',4,1);
CREATE TABLE audit_event (
	id TEXT NOT NULL, 
	ts INTEGER NOT NULL, 
	caller TEXT NOT NULL, 
	action TEXT NOT NULL, 
	account_id TEXT, 
	transaction_id TEXT, 
	details TEXT NOT NULL, 
	PRIMARY KEY (id)
)
 WITHOUT ROWID,
 STRICT

;
INSERT INTO "audit_event" VALUES('01a1fc0e-8796-7aeb-a132-30e85ef68e01',1795230173078680,'system','open_funded_wallets','01a1fc0e-8796-7ae1-a132-30e85ef68e01','01a1fc0e-8796-7ae4-a132-30e85ef68e01','{"owner_name": "user_alice", "name": "wallets:user_alice", "bonuses": {"GOLD": 1000000, "DMND": 500000, "PTS": 5000000}}');
INSERT INTO "audit_event" VALUES('01a1fc0e-8796-7af6-a132-30e85ef68e01',1795230173078680,'system','open_funded_wallets','01a1fc0e-8796-7aec-a132-30e85ef68e01','01a1fc0e-8796-7aef-a132-30e85ef68e01','{"owner_name": "user_bob", "name": "wallets:user_bob", "bonuses": {"GOLD": 800000, "DMND": 300000, "PTS": 2000000}}');
INSERT INTO "audit_event" VALUES('01a1fc0e-8796-7afb-a132-30e85ef68e01',1795230173078680,'system','open_funded_account','01a1fc0e-8796-7af7-a132-30e85ef68e01','01a1fc0e-8796-7af8-a132-30e85ef68e01','{"owner_name": "1001", "name": "atm:1001", "balance": 100000}');
INSERT INTO "audit_event" VALUES('01a1fc0e-8796-7b00-a132-30e85ef68e01',1795230173078680,'system','open_funded_account','01a1fc0e-8796-7afc-a132-30e85ef68e01','01a1fc0e-8796-7afd-a132-30e85ef68e01','{"owner_name": "1002", "name": "atm:1002", "balance": 25050}');
INSERT INTO "audit_event" VALUES('01a1fc0e-8796-7b02-a132-30e85ef68e01',1795230173078680,'system','open_funded_account','01a1fc0e-8796-7b01-a132-30e85ef68e01',NULL,'{"owner_name": "1003", "name": "atm:1003", "balance": 0}');
INSERT INTO "audit_event" VALUES('01a1fc0e-8796-7b07-a132-30e85ef68e01',1795230173078680,'system','open_funded_account','01a1fc0e-8796-7b03-a132-30e85ef68e01','01a1fc0e-8796-7b04-a132-30e85ef68e01','{"owner_name": "1004", "name": "atm:1004", "balance": 50000}');
INSERT INTO "audit_event" VALUES('01a1fc0e-8796-7b0c-a132-30e85ef68e01',1795230173078680,'system','open_funded_account','01a1fc0e-8796-7b08-a132-30e85ef68e01','01a1fc0e-8796-7b09-a132-30e85ef68e01','{"owner_name": "1005", "name": "atm:1005", "balance": 12345}');
INSERT INTO "audit_event" VALUES('01a1fc0e-8796-7b11-a132-30e85ef68e01',1795230173078680,'system','open_funded_account','01a1fc0e-8796-7b0d-a132-30e85ef68e01','01a1fc0e-8796-7b0e-a132-30e85ef68e01','{"owner_name": "1006", "name": "atm:1006", "balance": 999999}');
INSERT INTO "audit_event" VALUES('01a1fc0e-8d37-7a09-a132-30e85ef68e01',1795230174519627,'local','open_account','01a1fc0e-8d37-7a08-a132-30e85ef68e01',NULL,'{"body":{"owner_name":"Alice","asset":"USD"}}');
INSERT INTO "audit_event" VALUES('01a1fc0e-8d44-7cb5-a132-30e85ef68e01',1795230174532794,'local','open_account','01a1fc0e-8d44-7cb4-a132-30e85ef68e01',NULL,'{"body":{"owner_name":"Bob","asset":"USD"}}');
INSERT INTO "audit_event" VALUES('01a1fc0e-8d4e-76cf-a132-30e85ef68e01',1795230174542425,'local','deposit','01a1fc0e-8d37-7a08-a132-30e85ef68e01','01a1fc0e-8d4e-76cc-a132-30e85ef68e01','{"account_id":"01a1fc0e-8d37-7a08-a132-30e85ef68e01","body":{"amount":1050,"memo":"wages"}}');
INSERT INTO "audit_event" VALUES('01a1fc0e-8d5a-73ea-a132-30e85ef68e01',1795230174554244,'local','transfer','01a1fc0e-8d37-7a08-a132-30e85ef68e01','01a1fc0e-8d5a-73e7-a132-30e85ef68e01','{"body":{"source_account_id":"01a1fc0e-8d37-7a08-a132-30e85ef68e01","dest_account_id":"01a1fc0e-8d44-7cb4-a132-30e85ef68e01","amount":300,"memo":"rent"}}');
INSERT INTO "audit_event" VALUES('01a1fc0e-8d65-76a0-a132-30e85ef68e01',1795230174565414,'local','open_account','01a1fc0e-8d65-769f-a132-30e85ef68e01',NULL,'{"body":{"timestamp":1,"account_id":"a1"}}');
INSERT INTO "audit_event" VALUES('01a1fc0e-8d70-7ab3-a132-30e85ef68e01',1795230174576668,'local','deposit','01a1fc0e-8d65-769f-a132-30e85ef68e01','01a1fc0e-8d70-7ab0-a132-30e85ef68e01','{"body":{"timestamp":1,"account_id":"a1","amount":500}}');
INSERT INTO "audit_event" VALUES('01a1fc0e-8d77-7aaf-a132-30e85ef68e01',1795230174583667,'local','pay_counted','01a1fc0e-8d65-769f-a132-30e85ef68e01','01a1fc0e-8d77-7aac-a132-30e85ef68e01','{"body":{"timestamp":2,"account_id":"a1","amount":100}}');
CREATE TABLE entry (
	account_id TEXT NOT NULL, 
	seq INTEGER NOT NULL, 
	id TEXT NOT NULL, 
	transaction_id TEXT NOT NULL, 
	type TEXT NOT NULL, 
	amount INTEGER NOT NULL, 
	balance INTEGER NOT NULL, 
	PRIMARY KEY (account_id, seq), 
	CHECK (seq >= 1), 
	CHECK (type IN ('DEBIT', 'CREDIT')), 
	CHECK (amount >= 1), 
	FOREIGN KEY(account_id) REFERENCES account (id), 
	FOREIGN KEY(transaction_id) REFERENCES "transaction" (id)
)
 STRICT

;
INSERT INTO "entry" VALUES('01a1fc0e-8788-7604-bb05-7824dbd5def8',1,'01a1fc0e-8796-7ae5-a132-30e85ef68e01','01a1fc0e-8796-7ae4-a132-30e85ef68e01','DEBIT',1000000,-1000000);
INSERT INTO "entry" VALUES('01a1fc0e-8796-7ae1-a132-30e85ef68e01',1,'01a1fc0e-8796-7ae6-a132-30e85ef68e01','01a1fc0e-8796-7ae4-a132-30e85ef68e01','CREDIT',1000000,1000000);
INSERT INTO "entry" VALUES('01a1fc0e-8788-75fd-bb05-7824dbd5def8',1,'01a1fc0e-8796-7ae7-a132-30e85ef68e01','01a1fc0e-8796-7ae4-a132-30e85ef68e01','DEBIT',500000,-500000);
INSERT INTO "entry" VALUES('01a1fc0e-8796-7ae2-a132-30e85ef68e01',1,'01a1fc0e-8796-7ae8-a132-30e85ef68e01','01a1fc0e-8796-7ae4-a132-30e85ef68e01','CREDIT',500000,500000);
INSERT INTO "entry" VALUES('01a1fc0e-8788-7605-bb05-7824dbd5def8',1,'01a1fc0e-8796-7ae9-a132-30e85ef68e01','01a1fc0e-8796-7ae4-a132-30e85ef68e01','DEBIT',5000000,-5000000);
INSERT INTO "entry" VALUES('01a1fc0e-8796-7ae3-a132-30e85ef68e01',1,'01a1fc0e-8796-7aea-a132-30e85ef68e01','01a1fc0e-8796-7ae4-a132-30e85ef68e01','CREDIT',5000000,5000000);
INSERT INTO "entry" VALUES('01a1fc0e-8788-7604-bb05-7824dbd5def8',2,'01a1fc0e-8796-7af0-a132-30e85ef68e01','01a1fc0e-8796-7aef-a132-30e85ef68e01','DEBIT',800000,-1800000);
INSERT INTO "entry" VALUES('01a1fc0e-8796-7aec-a132-30e85ef68e01',1,'01a1fc0e-8796-7af1-a132-30e85ef68e01','01a1fc0e-8796-7aef-a132-30e85ef68e01','CREDIT',800000,800000);
INSERT INTO "entry" VALUES('01a1fc0e-8788-75fd-bb05-7824dbd5def8',2,'01a1fc0e-8796-7af2-a132-30e85ef68e01','01a1fc0e-8796-7aef-a132-30e85ef68e01','DEBIT',300000,-800000);
INSERT INTO "entry" VALUES('01a1fc0e-8796-7aed-a132-30e85ef68e01',1,'01a1fc0e-8796-7af3-a132-30e85ef68e01','01a1fc0e-8796-7aef-a132-30e85ef68e01','CREDIT',300000,300000);
INSERT INTO "entry" VALUES('01a1fc0e-8788-7605-bb05-7824dbd5def8',2,'01a1fc0e-8796-7af4-a132-30e85ef68e01','01a1fc0e-8796-7aef-a132-30e85ef68e01','DEBIT',2000000,-7000000);
INSERT INTO "entry" VALUES('01a1fc0e-8796-7aee-a132-30e85ef68e01',1,'01a1fc0e-8796-7af5-a132-30e85ef68e01','01a1fc0e-8796-7aef-a132-30e85ef68e01','CREDIT',2000000,2000000);
INSERT INTO "entry" VALUES('01a1fc0e-8788-7603-bb05-7824dbd5def8',1,'01a1fc0e-8796-7af9-a132-30e85ef68e01','01a1fc0e-8796-7af8-a132-30e85ef68e01','DEBIT',100000,-100000);
INSERT INTO "entry" VALUES('01a1fc0e-8796-7af7-a132-30e85ef68e01',1,'01a1fc0e-8796-7afa-a132-30e85ef68e01','01a1fc0e-8796-7af8-a132-30e85ef68e01','CREDIT',100000,100000);
INSERT INTO "entry" VALUES('01a1fc0e-8788-7603-bb05-7824dbd5def8',2,'01a1fc0e-8796-7afe-a132-30e85ef68e01','01a1fc0e-8796-7afd-a132-30e85ef68e01','DEBIT',25050,-125050);
INSERT INTO "entry" VALUES('01a1fc0e-8796-7afc-a132-30e85ef68e01',1,'01a1fc0e-8796-7aff-a132-30e85ef68e01','01a1fc0e-8796-7afd-a132-30e85ef68e01','CREDIT',25050,25050);
INSERT INTO "entry" VALUES('01a1fc0e-8788-7603-bb05-7824dbd5def8',3,'01a1fc0e-8796-7b05-a132-30e85ef68e01','01a1fc0e-8796-7b04-a132-30e85ef68e01','DEBIT',50000,-175050);
INSERT INTO "entry" VALUES('01a1fc0e-8796-7b03-a132-30e85ef68e01',1,'01a1fc0e-8796-7b06-a132-30e85ef68e01','01a1fc0e-8796-7b04-a132-30e85ef68e01','CREDIT',50000,50000);
INSERT INTO "entry" VALUES('01a1fc0e-8788-7603-bb05-7824dbd5def8',4,'01a1fc0e-8796-7b0a-a132-30e85ef68e01','01a1fc0e-8796-7b09-a132-30e85ef68e01','DEBIT',12345,-187395);
INSERT INTO "entry" VALUES('01a1fc0e-8796-7b08-a132-30e85ef68e01',1,'01a1fc0e-8796-7b0b-a132-30e85ef68e01','01a1fc0e-8796-7b09-a132-30e85ef68e01','CREDIT',12345,12345);
INSERT INTO "entry" VALUES('01a1fc0e-8788-7603-bb05-7824dbd5def8',5,'01a1fc0e-8796-7b0f-a132-30e85ef68e01','01a1fc0e-8796-7b0e-a132-30e85ef68e01','DEBIT',999999,-1187394);
INSERT INTO "entry" VALUES('01a1fc0e-8796-7b0d-a132-30e85ef68e01',1,'01a1fc0e-8796-7b10-a132-30e85ef68e01','01a1fc0e-8796-7b0e-a132-30e85ef68e01','CREDIT',999999,999999);
INSERT INTO "entry" VALUES('01a1fc0e-8788-7603-bb05-7824dbd5def8',6,'01a1fc0e-8d4e-76cd-a132-30e85ef68e01','01a1fc0e-8d4e-76cc-a132-30e85ef68e01','DEBIT',1050,-1188444);
INSERT INTO "entry" VALUES('01a1fc0e-8d37-7a08-a132-30e85ef68e01',1,'01a1fc0e-8d4e-76ce-a132-30e85ef68e01','01a1fc0e-8d4e-76cc-a132-30e85ef68e01','CREDIT',1050,1050);
INSERT INTO "entry" VALUES('01a1fc0e-8d37-7a08-a132-30e85ef68e01',2,'01a1fc0e-8d5a-73e8-a132-30e85ef68e01','01a1fc0e-8d5a-73e7-a132-30e85ef68e01','DEBIT',300,750);
INSERT INTO "entry" VALUES('01a1fc0e-8d44-7cb4-a132-30e85ef68e01',1,'01a1fc0e-8d5a-73e9-a132-30e85ef68e01','01a1fc0e-8d5a-73e7-a132-30e85ef68e01','CREDIT',300,300);
INSERT INTO "entry" VALUES('01a1fc0e-8788-7603-bb05-7824dbd5def8',7,'01a1fc0e-8d70-7ab1-a132-30e85ef68e01','01a1fc0e-8d70-7ab0-a132-30e85ef68e01','DEBIT',500,-1188944);
INSERT INTO "entry" VALUES('01a1fc0e-8d65-769f-a132-30e85ef68e01',1,'01a1fc0e-8d70-7ab2-a132-30e85ef68e01','01a1fc0e-8d70-7ab0-a132-30e85ef68e01','CREDIT',500,500);
INSERT INTO "entry" VALUES('01a1fc0e-8d65-769f-a132-30e85ef68e01',2,'01a1fc0e-8d77-7aad-a132-30e85ef68e01','01a1fc0e-8d77-7aac-a132-30e85ef68e01','DEBIT',100,400);
INSERT INTO "entry" VALUES('01a1fc0e-8788-7606-bb05-7824dbd5def8',1,'01a1fc0e-8d77-7aae-a132-30e85ef68e01','01a1fc0e-8d77-7aac-a132-30e85ef68e01','CREDIT',100,100);
CREATE TABLE idempotency_key (
	id TEXT NOT NULL, 
	fingerprint TEXT NOT NULL, 
	status INTEGER NOT NULL, 
	body TEXT NOT NULL, 
	location TEXT, 
	ts INTEGER NOT NULL, 
	PRIMARY KEY (id)
)
 STRICT

;
INSERT INTO "idempotency_key" VALUES('local|POST /accounts/{account_id}/deposit|pay-day','c7a47f0163e30166239604a90b261dd8e5145b68c65e4a8713d1efabec42ae33',200,'{"id":"01a1fc0e-8d37-7a08-a132-30e85ef68e01","name":null,"owner_name":"Alice","asset":"USD","status":"ACTIVE","balance":1050,"created_at":"2026-11-21T03:02:54.519627Z"}',NULL,1795230174542425);
INSERT INTO "idempotency_key" VALUES('local|POST /transfers|rent','d6f21c165f8ae3d00da47b308b6217ec1d44b932592e7733fb315bcad8b6881a',200,'{"transfer_id":"01a1fc0e-8d5a-73e7-a132-30e85ef68e01","amount":300,"asset":"USD","memo":"rent","ts":"2026-11-21T03:02:54.554244Z","source":{"id":"01a1fc0e-8d37-7a08-a132-30e85ef68e01","name":null,"owner_name":"Alice","asset":"USD","status":"ACTIVE","balance":750,"created_at":"2026-11-21T03:02:54.519627Z"},"dest":{"id":"01a1fc0e-8d44-7cb4-a132-30e85ef68e01","name":null,"owner_name":"Bob","asset":"USD","status":"ACTIVE","balance":300,"created_at":"2026-11-21T03:02:54.532794Z"}}',NULL,1795230174554244);
CREATE TABLE scheduled_cashback (
	payment_id TEXT NOT NULL, 
	account_id TEXT NOT NULL, 
	amount INTEGER NOT NULL, 
	clock TEXT NOT NULL, 
	due_at INTEGER NOT NULL, 
	credited_at INTEGER, 
	PRIMARY KEY (payment_id), 
	CHECK (clock IN ('SERVER', 'CALLER')), 
	CHECK (amount >= 0), 
	FOREIGN KEY(payment_id) REFERENCES "transaction" (id), 
	FOREIGN KEY(account_id) REFERENCES account (id)
)
 WITHOUT ROWID,
 STRICT

;
INSERT INTO "scheduled_cashback" VALUES('01a1fc0e-8d77-7aac-a132-30e85ef68e01','01a1fc0e-8d65-769f-a132-30e85ef68e01',2,'CALLER',86400002000,NULL);
CREATE TABLE schema_version (
	version INTEGER NOT NULL, 
	PRIMARY KEY (version)
)
 STRICT

;
INSERT INTO "schema_version" VALUES(1);
CREATE TABLE "transaction" (
	id TEXT NOT NULL, 
	kind TEXT NOT NULL, 
	memo TEXT, 
	ts INTEGER NOT NULL, 
	told_at INTEGER, 
	PRIMARY KEY (id)
)
 WITHOUT ROWID,
 STRICT

;
INSERT INTO "transaction" VALUES('01a1fc0e-8796-7ae4-a132-30e85ef68e01','BONUS',NULL,1795230173078680,NULL);
INSERT INTO "transaction" VALUES('01a1fc0e-8796-7aef-a132-30e85ef68e01','BONUS',NULL,1795230173078680,NULL);
INSERT INTO "transaction" VALUES('01a1fc0e-8796-7af8-a132-30e85ef68e01','DEPOSIT',NULL,1795230173078680,NULL);
INSERT INTO "transaction" VALUES('01a1fc0e-8796-7afd-a132-30e85ef68e01','DEPOSIT',NULL,1795230173078680,NULL);
INSERT INTO "transaction" VALUES('01a1fc0e-8796-7b04-a132-30e85ef68e01','DEPOSIT',NULL,1795230173078680,NULL);
INSERT INTO "transaction" VALUES('01a1fc0e-8796-7b09-a132-30e85ef68e01','DEPOSIT',NULL,1795230173078680,NULL);
INSERT INTO "transaction" VALUES('01a1fc0e-8796-7b0e-a132-30e85ef68e01','DEPOSIT',NULL,1795230173078680,NULL);
INSERT INTO "transaction" VALUES('01a1fc0e-8d4e-76cc-a132-30e85ef68e01','DEPOSIT','wages',1795230174542425,NULL);
INSERT INTO "transaction" VALUES('01a1fc0e-8d5a-73e7-a132-30e85ef68e01','TRANSFER','rent',1795230174554244,NULL);
INSERT INTO "transaction" VALUES('01a1fc0e-8d70-7ab0-a132-30e85ef68e01','DEPOSIT',NULL,1795230174576668,1000);
INSERT INTO "transaction" VALUES('01a1fc0e-8d77-7aac-a132-30e85ef68e01','PAYMENT',NULL,1795230174583667,2000);
CREATE INDEX account_owner ON account (owner_name, id);
CREATE INDEX ix_entry_transaction_id ON entry (transaction_id);
CREATE INDEX cashback_due ON scheduled_cashback (clock, due_at) WHERE credited_at IS NULL;
CREATE TRIGGER entry_follows BEFORE INSERT ON entry WHEN NEW.balance IS NOT CASE NEW.type WHEN 'CREDIT' THEN NEW.amount ELSE -NEW.amount END
           + CASE NEW.seq WHEN 1 THEN 0 ELSE (SELECT balance FROM entry
             WHERE account_id = NEW.account_id AND seq = NEW.seq - 1) END BEGIN SELECT RAISE(ABORT, 'an entry must follow its predecessor in seq and balance'); END;
CREATE TRIGGER entry_active BEFORE INSERT ON entry WHEN (SELECT status FROM account WHERE id = NEW.account_id) <> 'ACTIVE' BEGIN SELECT RAISE(ABORT, 'only an active account moves money'); END;
CREATE TRIGGER account_follows BEFORE UPDATE OF balance, last_seq ON account WHEN (NEW.last_seq, NEW.balance) <> (OLD.last_seq, OLD.balance)
           AND (NEW.last_seq, NEW.balance) IS NOT
           (SELECT seq, balance FROM entry WHERE account_id = NEW.id ORDER BY seq DESC LIMIT 1) BEGIN SELECT RAISE(ABORT, 'an account must stand where its last entry leaves it'); END;
CREATE TRIGGER account_empty BEFORE INSERT ON account WHEN (NEW.last_seq, NEW.balance) <> (0, 0) BEGIN SELECT RAISE(ABORT, 'an account opens empty'); END;
CREATE TRIGGER account_state BEFORE UPDATE ON account WHEN OLD.status = 'CLOSED' AND NEW.status <> 'CLOSED' OR NEW.last_seq <> OLD.last_seq
           AND 'ACTIVE' NOT IN (OLD.status, NEW.status) BEGIN SELECT RAISE(ABORT, 'a closed account never comes back, and only an active one moves money'); END;
CREATE TRIGGER account_identity BEFORE UPDATE OF id, asset, kind ON account WHEN 1 BEGIN SELECT RAISE(ABORT, 'these are for ever'); END;
CREATE TRIGGER account_kept BEFORE DELETE ON account WHEN 1 BEGIN SELECT RAISE(ABORT, 'accounts are never deleted'); END;
CREATE TRIGGER cashback_once BEFORE UPDATE ON scheduled_cashback WHEN OLD.credited_at IS NOT NULL OR (NEW.payment_id, NEW.account_id, NEW.amount, NEW.clock,
           NEW.due_at) <> (OLD.payment_id, OLD.account_id, OLD.amount, OLD.clock, OLD.due_at) BEGIN SELECT RAISE(ABORT, 'a cashback is credited once, as it was scheduled'); END;
CREATE TRIGGER cashback_kept BEFORE DELETE ON scheduled_cashback WHEN 1 BEGIN SELECT RAISE(ABORT, 'a promise is for ever'); END;
CREATE TRIGGER asset_kept BEFORE DELETE ON "asset" WHEN 1 BEGIN SELECT RAISE(ABORT, 'a row of asset is for ever'); END;
CREATE TRIGGER asset_unchanged BEFORE UPDATE ON "asset" WHEN 1 BEGIN SELECT RAISE(ABORT, 'a row of asset is for ever'); END;
CREATE TRIGGER entry_kept BEFORE DELETE ON "entry" WHEN 1 BEGIN SELECT RAISE(ABORT, 'a row of entry is for ever'); END;
CREATE TRIGGER entry_unchanged BEFORE UPDATE ON "entry" WHEN 1 BEGIN SELECT RAISE(ABORT, 'a row of entry is for ever'); END;
CREATE TRIGGER transaction_kept BEFORE DELETE ON "transaction" WHEN 1 BEGIN SELECT RAISE(ABORT, 'a row of transaction is for ever'); END;
CREATE TRIGGER transaction_unchanged BEFORE UPDATE ON "transaction" WHEN 1 BEGIN SELECT RAISE(ABORT, 'a row of transaction is for ever'); END;
CREATE TRIGGER audit_event_kept BEFORE DELETE ON "audit_event" WHEN 1 BEGIN SELECT RAISE(ABORT, 'a row of audit_event is for ever'); END;
CREATE TRIGGER audit_event_unchanged BEFORE UPDATE ON "audit_event" WHEN 1 BEGIN SELECT RAISE(ABORT, 'a row of audit_event is for ever'); END;
CREATE TRIGGER idempotency_key_kept BEFORE DELETE ON "idempotency_key" WHEN 1 BEGIN SELECT RAISE(ABORT, 'a row of idempotency_key is for ever'); END;
CREATE TRIGGER idempotency_key_unchanged BEFORE UPDATE ON "idempotency_key" WHEN 1 BEGIN SELECT RAISE(ABORT, 'a row of idempotency_key is for ever'); END;
COMMIT;
