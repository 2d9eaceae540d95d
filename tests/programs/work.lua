-- Tables, strings, closures, coroutines and garbage, for a program built with an address sanitizer.
local words, order = {}, {}
for line in io.lines(arg[1]) do
  for word in line:gmatch("%w+") do
    if not words[word] then
      words[word] = 0
      order[#order + 1] = word
    end
    words[word] = words[word] + 1
  end
  if #order > 6000 then break end
end
table.sort(order)

local function numbers(limit)
  return coroutine.wrap(function()
    local state = 1
    for _ = 1, limit do
      state = (state * 16807) % 2147483647
      coroutine.yield(state)
    end
  end)
end

for round = 1, 12 do
  local parts, sum = {}, 0
  for number in numbers(20000) do
    local word = order[number % #order + 1]
    parts[#parts + 1] = word:rep(number % 5 + 1):reverse():upper()
    sum = (sum + words[word] * number) % 1000000007
  end
  table.sort(parts)
  local text = table.concat(parts, " ")
  print(round, sum, #text, text:sub(1, 40))
end
