-- This script makes the load for wrk. Usage:
--   wrk [options] -s load.lua http://127.0.0.1:PORT -- ACCOUNTS_FILE MODE [API_KEY]
-- ACCOUNTS_FILE has one account id per line. MODE is one of these:
--   spread     transfers between two random accounts
--   hot        transfers that all touch the first account, in turn as source and destination
--   bulk       requests of 1,000 transfers, each between two random accounts
--   topup      top-ups of random users of wallets, named like the accounts: one treasury pays all
--   account    reads of a random account
--   statement  reads of the first page of 50 entries of the first account

local random, format = math.random, string.format
local accounts, host, mode = {}, nil, nil
local transfer_head, bulk_head, topup_tail, hot_is_source = nil, nil, nil, false

-- The seed is 48 random bits from the system, so that no two runs repeat their keys.
local function seed_from_system()
  local source = assert(io.open("/dev/urandom", "rb"))
  local seed = 0
  for _, byte in ipairs({ source:read(6):byte(1, 6) }) do
    seed = seed * 256 + byte
  end
  source:close()
  math.randomseed(seed)
end

local function random_key()
  return format("%08x-%04x-4%03x-%04x-%012x", random(0, 0xffffffff), random(0, 0xffff),
    random(0, 0xfff), random(0x8000, 0xbfff), random(0, 0xffffffffffff))
end

-- Every id and key is 36 characters long, so the length of the body never changes, and all
-- that a request needs is one concatenation.
local SOURCE, DEST, TAIL = '{"source_account_id":"', '","dest_account_id":"', '","amount":1}'

-- As many transfers as bench.py counts for a bulk request.
local BULK, BULK_HEAD, BULK_TAIL = 1000, '{"transfers":[', ']}'

local TOPUP = '{"amount":"0.0001","asset_type_id":1}'

local function body(source, dest)
  return SOURCE .. source .. DEST .. dest .. TAIL
end

local function transfer(source, dest)
  return transfer_head .. random_key() .. "\r\n\r\n" .. body(source, dest)
end

local function random_pair()
  local first = random(1, #accounts)
  local second = random(1, #accounts - 1)
  if second >= first then second = second + 1 end
  return first, second
end

local function get(path)
  return "GET " .. path .. " HTTP/1.1\r\nHost: " .. host .. "\r\n\r\n"
end

local makers = {}

function makers.spread()
  local first, second = random_pair()
  return transfer(accounts[first], accounts[second])
end

function makers.hot()
  local other = accounts[random(2, #accounts)]
  hot_is_source = not hot_is_source
  if hot_is_source then return transfer(accounts[1], other) end
  return transfer(other, accounts[1])
end

function makers.bulk()
  local transfers = {}
  for index = 1, BULK do
    local first, second = random_pair()
    transfers[index] = body(accounts[first], accounts[second])
  end
  return bulk_head .. random_key() .. "\r\n\r\n" .. BULK_HEAD .. table.concat(transfers, ",")
    .. BULK_TAIL
end

function makers.topup()
  return "POST /api/v1/wallets/users/" .. accounts[random(1, #accounts)] .. topup_tail
    .. random_key() .. "\r\n\r\n" .. TOPUP
end

function makers.account()
  return get("/accounts/" .. accounts[random(1, #accounts)])
end

function makers.statement()
  return get("/accounts/" .. accounts[1] .. "/statement?limit=50")
end

function init(args)
  for line in io.lines(args[1]) do
    assert(#line == 36, "an account id must have 36 characters")
    accounts[#accounts + 1] = line
  end
  assert(#accounts >= 2, "at least two accounts are needed")
  mode = args[2]
  request = assert(makers[mode], "unknown mode")
  host = wrk.host .. ":" .. wrk.port
  local api_key = args[3] and ("\r\nX-API-Key: " .. args[3]) or ""
  local function head(path, length)
    return path .. " HTTP/1.1\r\nHost: " .. host .. api_key
      .. "\r\nContent-Type: application/json\r\nContent-Length: " .. length
      .. "\r\nIdempotency-Key: "
  end
  local length = #SOURCE + 36 + #DEST + 36 + #TAIL
  transfer_head = head("POST /transfers", length)
  -- Between two transfers stands a comma.
  bulk_head = head("POST /transfers/bulk", #BULK_HEAD + BULK * (length + 1) - 1 + #BULK_TAIL)
  topup_tail = head("/top-up", #TOPUP)
  seed_from_system()
end

-- The last line is for the program that started wrk. A single refused request fails the run.
function done(summary, latency, requests)
  local errors = summary.errors
  local failures = errors.connect + errors.read + errors.write + errors.status + errors.timeout
  print(format("RESULT requests=%d duration_us=%d p50_us=%d p99_us=%d failures=%d",
    summary.requests, summary.duration, latency:percentile(50), latency:percentile(99), failures))
  if failures > 0 then
    io.stderr:write(format("load: %d failures, of which %d were non-2xx answers\n",
      failures, errors.status))
    os.exit(1)
  end
end
